import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from config import PRESETS, Deepen, InputError, Phase, Run, Widen, full, tiny
from train import main
from utils.cli import parse, run_command
from utils.errors import RunStopped
from utils.history import History
from utils.signals import Stopped

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def flags(config, prefix="--"):
    for field in fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            yield from flags(value, name + ".")
        elif not isinstance(value, dict):
            yield name


def refused(args, capsys):
    """What stderr says of a command line that is none."""
    with pytest.raises(SystemExit) as left:
        run_command(lambda: print(parse(args)))
    out, err = capsys.readouterr()
    assert left.value.code == 2 and not out
    assert re.fullmatch("error: .+\n", err) and "---" not in err
    return err


def test_a_preset_comes_first_and_without_one_it_is_full():
    assert parse([]) == parse(["full"]) == full() and parse(["tiny"]) == tiny()
    assert parse(["--seed", "3"]) == replace(full(), seed=3)


def test_any_field_can_be_overridden_with_hyphens_or_underscores():
    args = "--training.lr-phase1 1e-2 --training.batch_size_phase3 5 --training.deepen.where end"
    args += " --model.n-kv-heads 1 --model.no-tied --training.micro_batch_size None --out a/b"
    run, base = parse(["tiny", *args.split()]), tiny()
    assert run.model == replace(base.model, n_kv_heads=1, tied=False)
    deepen = Deepen(base.training.deepen.extra_layers, "end")
    changes = {"lr_phase1": 1e-2, "batch_size_phase3": 5, "deepen": deepen}
    assert run.training == replace(base.training, **changes)
    assert run == replace(base, model=run.model, training=run.training, out=Path("a/b"))
    assert run.schedule["dense"].lr == 1e-2 and run.schedule["wide"].batch_size == 5


def test_a_schedule_of_its_own_is_overridden_by_the_names_of_its_phases(monkeypatch, capsys):
    own = Run(phases={"dense": Phase(steps=3), "wide": Phase(Widen(2), steps=4)})
    monkeypatch.setitem(PRESETS, "own", lambda: own)
    run = parse(["own", "--phases.wide.grow.factor", "3", "--phases.dense.steps", "9"])
    assert run.schedule == {"dense": Phase(steps=9), "wide": Phase(Widen(3), steps=4)}
    assert "training.steps_phase1" in refused(["own", "--training.steps-phase1", "9"], capsys)


@pytest.mark.parametrize("preset", PRESETS)
def test_help_documents_every_field(preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # one option below the other
    with pytest.raises(SystemExit, match=r"^0$"):
        parse([preset, "--help"])
    said = capsys.readouterr().out
    documented = re.findall(r"(--\S+?)[ ,].*\n\W+(?!\W*\(default)\w", said)
    assert set(flags(PRESETS[preset]())) <= set(documented)
    assert all(f"{name}: {make.__doc__}" in said for name, make in PRESETS.items())


@pytest.mark.parametrize(
    "args, says",
    [
        ("tinny", ["there is no preset tinny, only full, tiny; perhaps you meant tiny"]),
        ("tiny --training.lr-phas1 1", ["lr-phas1, 1; perhaps you meant --training.lr-phase1"]),
        ("tiny --training.lr-phase1 fast", ["--training.lr-phase1", "'fast'"]),
        ("tiny --precision fp16", ["--precision", "'fp16'", "'bf16'"]),
        ("tiny --training.grad-clip 0", ["training.grad_clip = 0.0 must be positive"]),
        ("tiny --training.widen.factor 0", ["training.widen: factor = 0"]),
        ("tiny --model.n-heads 5", ["model.n_heads = 5 does not divide model.d_model = 64"]),
    ],
)
def test_what_cannot_be_run_is_named_on_stderr_with_exit_code_2(args, says, capsys):
    err = refused(args.split(), capsys)
    assert all(part in err for part in says)


@pytest.mark.parametrize(
    "error, code, says",
    [
        (InputError("seed = x"), 2, "error: seed = x\n"),
        (RunStopped("phase 1, step 3"), 1, "stopped: phase 1, step 3\n"),
        (Stopped(2), 130, "stopped by SIGINT; run the same command again\n"),
        (Stopped(15), 143, "stopped by SIGTERM; run the same command again\n"),
    ],
)
def test_each_end_has_its_exit_code_and_one_line(error, code, says, capsys):
    def command():
        raise error

    with pytest.raises(SystemExit) as left:
        run_command(command)
    assert (left.value.code, capsys.readouterr().err) == (code, says)


def test_success_and_errors_of_the_program_itself_pass_through():
    run_command(lambda: None)
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: print(1 / 0))


@pytest.fixture
def train(tmp_path, capsys):
    """Runs the program on a command line: its exit code, stdout and stderr."""
    small = f"tiny --data.num-stories 100 --data.cache {tmp_path}/cache --out {tmp_path}/run"

    def train(args):
        try:
            run_command(lambda: main(parse(f"{small} {args}".split())))
            code = 0
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return train


@pytest.mark.parametrize(
    "args, says",
    [
        ("--device cuda:99", "device = cuda:99 is not there"),
        ("--model.seq-len 1000000", "training text"),
        ("--model.seq-len 4000", "held-out text"),
        ("--model.vocab-size 100", "model.vocab_size = 100"),
        ("--training.steps-phase2 -1", "steps_phase2 = -1"),
        ("--training.micro-batch-size 7", "phase 1 (dense): training.micro_batch_size = 7"),
        ("--data.source none.txt", "data.source = none.txt"),
        ("--out pyproject.toml/run", "out = pyproject.toml/run"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(args, says, train, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = train(args)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_every_phase_and_writes_nothing(train, tmp_path):
    code, out, _ = train("--dry-run")
    assert code == 0 and not (tmp_path / "run").exists()
    assert all(phase in out for phase in ("1 dense", "2 moe", "3 wide", "4 deep"))


@pytest.mark.parametrize("last, says", [("end", "a finished run"), ("step", "an unfinished run")])
def test_a_folder_that_holds_a_run_is_left_as_it_is(last, says, train, tmp_path):
    history = tmp_path / "run" / "training_history.jsonl"
    history.parent.mkdir()
    with History(history) as note:
        note("run")
        note(last)
    before = history.read_bytes(), history.stat().st_mtime_ns
    code, _, err = train("")
    assert code == 2 and says in err and "--overwrite" in err
    assert (history.read_bytes(), history.stat().st_mtime_ns) == before
    assert list(history.parent.iterdir()) == [history]


def test_the_program_run_from_another_folder_exits_as_its_commands_do(tmp_path):
    command = [sys.executable, ROOT / "train.py", "tinny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "tiny" in done.stderr
    assert not list(tmp_path.iterdir())
