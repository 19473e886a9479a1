"""From the command line to a run, and what a command says and returns as it ends."""

import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from config import PRESETS, Deepen, InputError, Phase, Run, Widen, full, tiny
from tests.helpers.damage import capture_command
from train import main
from utils.metrics.history import HISTORY_FILE, History
from utils.runtime.cli import decode_argument, parse_run, run_command
from utils.runtime.errors import RunStopped
from utils.runtime.signals import Stopped

ROOT = Path(__file__).parents[2]


def flag_names(config, prefix="--"):
    """Yields the option of every field of a dataclass and of those within it."""
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            yield from flag_names(value, name + ".")
        elif not isinstance(value, dict):
            yield name


def parse_error(args, capsys):
    """Returns the one line on stderr for a command line that makes no run."""
    code, _, error = capture_command(lambda: print(parse_run(args)), capsys)
    assert code == 2 and re.fullmatch("error: [ -~]+\n", error) and "---" not in error
    return error


def test_a_preset_comes_first_and_without_one_it_is_full():
    assert parse_run([]) == parse_run(["full"]) == full() and parse_run(["tiny"]) == tiny()
    assert parse_run(["--seed", "3"]) == replace(full(), seed=3)


def test_any_field_can_be_overridden_with_hyphens_or_underscores():
    flags = (
        "--training.lr-phase1 1e-2 --training.batch_size_phase3 5 --out a/b "
        "--training.deepen.placement end --training.micro_batch_size None "
        "--training.widen.tolerance.max-logit-drift 0.5 "
        "--model.n-kv-heads 1 --model.no-tie-embeddings"
    )
    run, base = parse_run(["tiny", *flags.split()]), tiny()
    assert run.model == replace(base.model, n_kv_heads=1, tie_embeddings=False)
    widen = base.training.widen
    changes = {
        "lr_phase1": 1e-2,
        "batch_size_phase3": 5,
        "deepen": Deepen(base.training.deepen.extra_layers, "end"),
        "widen": replace(widen, tolerance=replace(widen.tolerance, max_logit_drift=0.5)),
    }
    assert run.training == replace(base.training, **changes)
    assert run == replace(base, model=run.model, training=run.training, out=Path("a/b"))
    assert run.schedule["dense"].lr == 1e-2 and run.schedule["wide"].batch_size == 5


def test_a_schedule_of_its_own_is_overridden_by_the_names_of_its_phases(monkeypatch, capsys):
    own = Run(phases={"dense": Phase(steps=3), "wide": Phase(Widen(2), steps=4)})
    monkeypatch.setitem(PRESETS, "own", lambda: own)
    run = parse_run(["own", "--phases.wide.growth.factor", "3", "--phases.dense.steps", "9"])
    assert run.schedule == {"dense": Phase(steps=9), "wide": Phase(Widen(3), steps=4)}
    for flags in ("--training.steps-phase1 9", "--resume --training.batch-size-phase3 7"):
        error = parse_error(["own", *flags.split()], capsys)
        assert "training." in error and "would have no effect" in error


@pytest.mark.parametrize("preset", PRESETS)
def test_help_documents_every_field(preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # one option below the other
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_run([preset, "--help"])
    help_text = capsys.readouterr().out
    documented = re.findall(r"(--\S+?)[ ,].*\n\W+(?!\W*\(default)\w", help_text)
    assert set(flag_names(PRESETS[preset]())) <= set(documented)
    assert len(set(documented)) == len(documented), "each of them once"
    text = " ".join(help_text.split())
    docs = {name: " ".join((make.__doc__ or "").split()) for name, make in PRESETS.items()}
    assert all(f"{name}: {doc}" in text for name, doc in docs.items())


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("preset, phase", [("tiny", "training"), ("single", "phases.single")])
def test_help_begins_with_ten_options_and_fills_the_lines_of_a_terminal(
    preset, phase, columns, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        parse_run([preset, "--help"])
    lines = capsys.readouterr().out.splitlines()
    options = [line.split()[0].strip(",") for line in lines if line.startswith("  -")]
    steps = f"--{phase}.steps{'-phase1' if preset == 'tiny' else ''}"
    assert options[:11] == [
        *("--out", "--resume", "--dry-run", "--data.source", "--data.tokenizer", steps),
        *(f"--{phase}.batch-size", "--init-from", "--seed", "--device", "-h"),
    ]
    longest_name = max(map(len, options)) + len("  {None}|FLOAT  ")
    assert max(map(len, lines)) <= max(columns, longest_name)
    docs = [(a, b) for a, b in pairwise(lines) if a[:6] == b[:6] == 6 * " "]
    assert len(docs) > 50
    assert not [a for a, b in docs if len(a) + 1 + len(b.split()[0]) <= columns]


def test_help_of_a_preset_shows_its_own_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_run(["tiny", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.d-model INT Width of the residual stream. (default: 64)" in text


@pytest.mark.parametrize(
    "args, phrases",
    [
        (
            "tinny",
            ["there is no preset tinny, only full, tiny, single, grow_moe; perhaps you meant tiny"],
        ),
        ("--seed 1 tiny", ["the preset comes first"]),
        ("tiny --training.lr-phas1 1", ["lr-phas1; perhaps you meant --training.lr-phase1"]),
        ("tiny --trainig.seed 1 --dta.source x", ["--dta.source", "perhaps --data.source in"]),
        ("tiny --training.lr-phase1 fast", ["error: --training.lr-phase1: 'fast' is no number"]),
        ("tiny --model.n-kv-heads x", ["error: --model.n-kv-heads: 'x' is no whole number, nor"]),
        ("tiny --precision fp16", ["--precision", "'fp16'", "'bf16'"]),
        ("tiny --out", ["Missing value for argument '--out'\n"]),
        ("single --phases.single.lr -1", ["error: phases.single: lr = -1.0 must be"]),
        ("--resume --overwrite", ["error: resume goes on with what overwrite"]),
        ("tiny --training.grad-clip 0", ["error: training.grad_clip = 0.0 must be a"]),
        ("tiny --training.widen.factor 0", ["error: training.widen.factor = 0 must be"]),
        ("tiny --model.n-heads 5", ["error: model.n_heads = 5 does not divide model.d_model"]),
    ],
)
def test_what_cannot_be_run_is_named_on_stderr_with_exit_code_2(args, phrases, capsys):
    error = parse_error(args.split(), capsys)
    assert all(phrase in error for phrase in phrases), error


@pytest.mark.parametrize(
    "error, code, line",
    [
        (InputError("seed = x"), 2, "error: seed = x\n"),
        (RunStopped("phase 1, step 3"), 1, "stopped: phase 1, step 3\n"),
        (Stopped(2), 130, "stopped by SIGINT; run the same command again\n"),
        (Stopped(15), 143, "stopped by SIGTERM; run the same command again\n"),
    ],
)
def test_each_end_has_its_exit_code_and_one_line(error, code, line, capsys):
    def command():
        raise error

    assert capture_command(command, capsys) == (code, "", line)


def test_success_and_errors_of_the_program_itself_pass_through():
    run_command(lambda: None)
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: print(1 / 0))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_no_character_stops_a_command(encoding, stream, monkeypatch):
    text, raw = "café, мир, \udce9", io.BytesIO()
    monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, encoding))
    run_command(lambda: print(text, file=getattr(sys, stream), flush=True))
    assert raw.getvalue().rstrip() == text.encode(encoding, "backslashreplace")


def test_an_argument_is_text_in_any_locale_or_is_named():
    assert decode_argument("prompt", "café") == "café"
    in_ascii = "café".encode().decode("ascii", "surrogateescape")
    assert decode_argument("prompt", in_ascii) == "café"
    for value in ("\udce9", "\ud83d"):
        with pytest.raises(InputError, match=r"^prompt = '.ud\w+' is not text"):
            decode_argument("prompt", value)


def test_a_command_whose_output_nobody_reads_on_ends_without_a_word():
    code = "from utils.runtime.cli import run_command; run_command(lambda: print('x', flush=True))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.fixture
def train(tmp_path, capsys):
    """Runs train.py's command with flags for a small run. Returns exit code, stdout and stderr."""
    small = f"tiny --data.num-stories 100 --data.cache {tmp_path}/cache --out {tmp_path}/run"
    return lambda flags: capture_command(
        lambda: main(parse_run(f"{small} {flags}".split())), capsys
    )


def test_a_dry_run_shows_every_phase_and_writes_nothing(train, tmp_path):
    code, output, _ = train("--dry-run")
    assert code == 0 and not (tmp_path / "run").exists()
    assert all(phase in output for phase in ("1 dense", "2 moe", "3 wide", "4 deep"))
    line = f"dry run: this run would start; nothing was written into {tmp_path}/run\n"
    assert output.endswith(line)


def test_a_dry_run_of_what_would_not_start_shows_the_plan_and_exits_with_2(train, tmp_path):
    code, output, error = train("--dry-run --model.d-ff 4000000")
    assert code == 2 and "4 deep" in output and "dry run" not in output
    assert re.match(r"error: this run would not start: phase 4 \(deep\) needs about ", error)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dense_model.pt").write_bytes(b"")
    code, output, error = train("--dry-run")
    assert code == 2 and "4 deep" in output and "holds dense_model.pt: --overwrite" in error
    code, output, _ = train("--dry-run --overwrite")
    assert code == 0 and "would start" in output


@pytest.mark.parametrize("last, kind", [("end", "a finished run"), ("step", "an unfinished run")])
def test_a_folder_that_holds_a_run_is_left_as_it_is(last, kind, train, tmp_path):
    path = tmp_path / "run" / HISTORY_FILE
    path.parent.mkdir()
    with History(path) as history:
        history("run", config=asdict(tiny()), corpus="builtin", phases=["deep"])
        history("checkpoint", path="last.pt")
        history(last)
    before = path.read_bytes(), path.stat().st_mtime_ns
    code, _, error = train("")
    assert code == 2 and kind in error and "--overwrite" in error
    further = f"python train.py single --init-from {tmp_path}/run/last.pt --out {tmp_path}/run-more"
    assert (further in error) == (kind == "a finished run")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert list(path.parent.iterdir()) == [path]


MISTAKES = {
    "train.py tiny --trainig.steps-phase1 5": "perhaps you meant --training.steps-phase1",
    "-m utils.generate a.pt --lenght 3": "perhaps you meant --length",
    "-m utils.hf grow a b --wident 3": "perhaps you meant --widen",
    "-m utils.hf export": "missing: CHECKPOINT, FOLDER",
    "-m utils.plot a --x miles": "invalid choice 'miles' for argument '--x'",
    "-m utils.benchmark --repaets 3": "perhaps you meant --repeats",
    "-m utils.experiment noise tiny --seds 3": "perhaps you meant --seeds",
    "-m utils.experiment keep a": "missing: FILE",
    "transfer/verify_growth_mechanics.py --befor a.pt": "perhaps you meant --before",
}


def run_in_terminal(command: str, columns: int, variables: dict[str, str]) -> tuple[int, str]:
    """Runs Python in a terminal of so many columns. Returns its exit code and what it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, *command.split()],
        cwd=ROOT, env=environment | variables, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # so the end of a terminal is told
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    return process.wait(), shown.decode()


@pytest.mark.parametrize("command, hint", MISTAKES.items(), ids=MISTAKES)
def test_every_command_names_a_mistake_in_one_plain_line_of_a_terminal(command, hint):
    code, shown = run_in_terminal(command, 80, {"TERM": "xterm-256color"})
    assert code == 2 and re.fullmatch(r"error: [ -~]+\r\n", shown) and hint in shown


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("variables", [{"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_kind_of_terminal_changes_an_error(columns, variables):
    (command, _), *_ = MISTAKES.items()
    args = [sys.executable, *command.split()]
    piped = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    code, shown = run_in_terminal(command, columns, variables)
    assert (code, shown.replace("\r\n", "\n")) == (piped.returncode, piped.stderr)
    assert "perhaps you meant --training.steps-phase1" in shown and not piped.stdout


@pytest.fixture
def program(tmp_path):
    """A function that edits a copy of config.py, then runs `train.py` beside it, which never comes
    so far that it needs the rest."""
    for file in (ROOT / "utils" / "runtime").glob("*.py"):
        (tmp_path / "utils" / "runtime").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "utils" / "runtime")
    shutil.copy(ROOT / "train.py", tmp_path)

    def run(args: str, old: str, new: str) -> subprocess.CompletedProcess:
        text = (ROOT / "config.py").read_text()
        assert text.count(old) == 1
        (tmp_path / "config.py").write_text(text.replace(old, new))
        command = [sys.executable, "train.py", *args.split()]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("steps_phase1", "steps_phase1: NonNegativeInt = 1000", "steps_phase1: int = 60.5"),
        ("steps_phase1", "        steps_phase1=240,", "        steps_phase1=60.5,"),
        ("lr_phase2", "lr_phase2: NonNegativeFloat = 2e-4", "lr_phase2: float = '2e-4'"),
    ],
)
def test_a_wrong_value_edited_into_config_is_named_in_one_line(name, old, new, program):
    done = program("tiny", old, new)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(f"error: training.{name} = .+ must be .+\n", done.stderr)


def test_a_function_added_to_config_is_a_preset(program):
    added = "def mine() -> Run:\n    return replace(tiny(), seed=7)\n\n\ndef full() -> Run:"
    done = program("mine --help", "def full() -> Run:", added)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert "--seed INT Seed of the initial weights, the batches, the noise of growth" in text
    assert "and the samples. (default: 7)" in text and "(default: 64)" in text


def test_the_program_run_from_another_folder_exits_as_its_commands_do(tmp_path):
    command = [sys.executable, ROOT / "train.py", "tinny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "tiny" in done.stderr
    assert not list(tmp_path.iterdir())
