"""A run that is resumed with other settings: they hold from there on, and the run says so."""

import re
from collections import defaultdict
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import pytest
from torch.testing import assert_close

from config import InputError, Phase, Run, Upcycle
from tests.helpers.damage import capture_command, snapshot_folder
from tests.helpers.small_models import is_identical
from tests.helpers.small_runs import (
    CHECKPOINTS,
    FOUR_PHASES,
    MODEL,
    TRAINING,
    comparable_history,
)
from tests.training.test_step import train_again
from train import adopt_run_settings, main
from transfer import TrainState
from utils.checkpoint.model import load_checkpoint
from utils.checkpoint.run_dir import is_finished
from utils.data import get_batch, prepare_corpus
from utils.metrics.history import HISTORY_FILE, read_history, select_events
from utils.metrics.history_fields import ALWAYS, HISTORY_FIELDS
from utils.plot.figure import make_figure
from utils.runtime.cli import parse_run
from utils.schedule.lr import lr_at
from utils.schedule.phases import resolve_phases
from utils.training.step import batches

DOCS = Path(__file__).parents[2] / "docs"
FLAT = replace(TRAINING, warmup_fraction=0.0, min_lr_ratio=1.0, log_every=1)


def train_with(run: Run, **changes) -> Run:
    return replace(run, training=replace(run.training, **changes))


def stop_run(run: Run, steps: int) -> None:
    """Carries a run out, interrupts it after so many steps, and leaves a point at the last."""
    run, left = train_with(run, checkpoint_every="1"), steps

    def some_batches(*args):
        nonlocal left
        for tokens in islice(batches(*args), left):
            left -= 1
            yield tokens
        interrupt()

    def interrupt(*_):
        if not left:
            raise KeyboardInterrupt
        return []

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("utils.training.phase.batches", some_batches)
        patch.setattr("utils.training.phase.sample_stories", interrupt)
        main(run)


def resume(run: Run, **changes) -> list[dict]:
    """Goes on with a run, with changed settings of `training`. Returns its history."""
    main(replace(train_with(run, **changes), resume=True))
    return read_history(run.out / HISTORY_FILE)


def history_but_for_changes(run: Run) -> list[dict]:
    return [event for event in comparable_history(run.out) if event["event"] != "change"]


def assert_same_outcome(one: Run, other: Run, names: list[str]) -> None:
    """Two runs have the same weights, bit for bit, and the same history but for changes."""
    for name in names:
        states = [load_checkpoint(run.out / name).state for run in (one, other)]
        assert is_identical(*states), name
    assert history_but_for_changes(one) == history_but_for_changes(other)


def test_what_changes_before_a_phase_is_as_if_it_had_been_so_from_the_start(base_run, tmp_path):
    training = replace(FOUR_PHASES, decay_to="floor")
    old = replace(base_run, training=training, out=tmp_path / "resumed")
    new = {"lr_phase2": 2e-3, "steps_phase2": 7, "batch_size_phase3": 5, "steps_phase4": 2}
    stop_run(old, 5)
    events = resume(old, **new)
    whole = train_with(replace(old, out=tmp_path / "whole"), **new)
    main(whole)
    assert_same_outcome(old, whole, CHECKPOINTS)
    changes = [(event["setting"], event["new"]) for event in select_events(events, "change")]
    assert changes == sorted((f"training.{name}", value) for name, value in new.items())


def one_phase(base_run, out, training=FLAT, **phase) -> Run:
    phases = {"only": Phase(**{"steps": 9, "batch_size": 4, "lr": 1e-2} | phase)}
    return replace(base_run, training=training, phases=phases, out=out, precision="fp32")


def resume_phase(run: Run, training=FLAT, **phase) -> Run:
    """Goes on with a run of one phase as another run of one phase. Returns that."""
    phases = {"only": replace(run.phases["only"], **phase)}
    run = replace(run, training=training, phases=phases, resume=True)
    main(run)
    return run


@pytest.mark.parametrize("done, steps, others", [(8, 12, 12), (4, 12, 12), (4, 4, 4)])
def test_a_phase_takes_as_many_steps_as_it_is_told_last(done, steps, others, base_run, tmp_path):
    run = one_phase(base_run, tmp_path / "resumed")
    stop_run(run, done)
    resume_phase(run, steps=steps)
    whole = one_phase(base_run, tmp_path / "whole", steps=others)
    main(whole)
    assert_same_outcome(run, whole, ["only_final.pt"])


def test_the_last_phase_cannot_go_on_once_it_has_been_trained(base_run, tmp_path):
    """Nothing that follows needs Adam's state, which is then not kept."""
    run = one_phase(base_run, tmp_path)
    stop_run(run, 9)
    with pytest.raises(InputError, match=r"phases.only.steps was 9, is 12, but .* been trained"):
        resume_phase(run, steps=12)


def test_a_phase_that_was_saved_goes_on_if_the_next_has_no_point_yet(base_run, tmp_path):
    run = replace(base_run, training=replace(FOUR_PHASES, decay_to="floor", warmup_fraction=0.0))
    run = train_with(replace(run, out=tmp_path / "resumed"), min_lr_ratio=1.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("utils.training.phase.grow", lambda *_, **__: 1 / 0)
        main(run)
    assert (run.out / "dense_model.pt").exists()
    resume(run, steps_phase1=8)
    whole = train_with(replace(run, out=tmp_path / "whole"), steps_phase1=8)
    main(whole)
    assert_same_outcome(run, whole, CHECKPOINTS)


def test_every_step_after_a_change_is_adamws_with_the_new_settings(base_run, tmp_path):
    old = replace(TRAINING, log_every=2, eval_every=100, grad_clip=0.5, warmup_fraction=0.3)
    old = replace(old, eps=1e-3)
    new = replace(
        old, grad_clip=0.1, weight_decay=2.0, beta1=0.5, beta2=0.8, eps=1e-2, warmup_fraction=0.6,
        load_balance_coef=0.5, z_loss_coef=0.05,
    )  # fmt: skip
    run = replace(one_phase(base_run, tmp_path, old), model=replace(MODEL, num_experts=4), seed=3)
    stop_run(run, 4)
    resumed = resume_phase(run, new, steps=8, batch_size=6, lr=3e-3)

    corpus = prepare_corpus(run.data, MODEL.vocab_size)
    start = one_phase(base_run, tmp_path / "start", old, steps=0)
    main(replace(start, model=run.model, seed=3))
    saved = load_checkpoint(tmp_path / "start" / "only_final.pt")
    state, lrs = TrainState(saved.config, saved.weights), []
    for part, steps in ((run, range(4)), (resumed, range(4, 8))):
        (phase,) = resolve_phases(part)
        rates = [lr_at(step, phase, part.training) for step in steps]
        batches = [get_batch(corpus.train, MODEL.seq_len, phase.batch_size, 3, i) for i in steps]
        state, _ = train_again(state, {}, part.training, rates, batches)
        lrs += rates
    ends = load_checkpoint(tmp_path / "only_final.pt").weights
    assert_close(ends, state.weights, rtol=1e-4, atol=1e-6)

    events = read_history(tmp_path / HISTORY_FILE)
    steps = [(e["step"], e["tokens"], e["lr"]) for e in select_events(events, "step")]
    tokens = [128 * min(step, 4) + 192 * max(step - 4, 0) for step in (2, 4, 6, 8)]
    assert steps == list(zip((2, 4, 6, 8), tokens, lrs[1::2], strict=True))
    (trained,) = select_events(events, "checkpoint")
    assert trained["phase_tokens"] == events[-1]["tokens"] == tokens[-1]
    assert load_checkpoint(tmp_path / "only_final.pt").tokens == tokens[-1]


def test_every_field_that_is_declared_is_written_by_some_run_and_no_other(
    base_run, finished, tmp_path
):
    """The histories in docs/ were written on a GPU and thinned."""
    run = one_phase(base_run, tmp_path)
    stop_run(run, 3)
    resume_phase(run, lr=1e-3)
    written = defaultdict(set)
    paths = [out / HISTORY_FILE for out in (tmp_path, finished.out)]
    for event in chain.from_iterable(map(read_history, [*paths, *DOCS.rglob("*.jsonl")])):
        written[event["event"]] |= event.keys() - ALWAYS.keys()
    assert written == {event: set(fields) for event, fields in HISTORY_FIELDS.items()}


def test_changes_are_recorded_printed_and_drawn(base_run, tmp_path, capsys):
    run = one_phase(base_run, tmp_path)
    stop_run(run, 3)
    resume_phase(run, lr=1e-3, batch_size=2)
    events = read_history(tmp_path / HISTORY_FILE)
    where = {"phase": 1, "phase_name": "only", "step": 3, "tokens": 384}
    assert [{k: v for k, v in e.items() if k != "wall_s"} for e in events if "setting" in e] == [
        {"event": "change", **where, "setting": "phases.only.batch_size", "old": 4, "new": 2},
        {"event": "change", **where, "setting": "phases.only.lr", "old": 1e-2, "new": 1e-3},
    ]
    output = capsys.readouterr().out
    assert re.search(r" 768 +2 x 32 +0\.001\n", output)  # tokens: 3 steps of 4 x 32, 6 of 2 x 32
    line = "changed phases.only.lr from 0.01 to 0.001 at phase 1 (only), step 3"
    assert output.count(line) == 2  # in the header, and in the summary
    lines = make_figure({"run": events}).axes[0].lines
    assert sum(list(each.get_xdata()) == [384, 384] for each in lines) == 1


@pytest.mark.parametrize(
    "others",
    [
        {"eval_tokens": 700},
        {"final_eval_tokens": 900},
        {"eval_tokens": 700, "final_eval_tokens": 900},
    ],
)
def test_losses_on_other_text_are_not_compared_with_that_before_the_growth(
    others, base_run, tmp_path
):
    training = replace(FLAT, eval_every=1)
    phases = {"a": Phase(steps=1, batch_size=2), "b": Phase(Upcycle(4), steps=4, batch_size=2)}
    run = replace(base_run, training=training, phases=phases, out=tmp_path / "run")
    stop_run(run, 3)
    events = resume(run, **others)
    evals = [event for event in select_events(events, "eval") if event["phase"] == 2]
    compared = [event["step"] for event in evals if "above_growth" in event]
    assert compared == [0, 1] and [event["step"] for event in evals] == [0, 1, 2, 3, 4]
    whole = train_with(replace(run, out=tmp_path / "whole"), **others)
    main(whole)
    whole_evals = select_events(read_history(whole.out / HISTORY_FILE), "eval")[-5:]
    same = [a["valid_loss"] == b["valid_loss"] for a, b in zip(evals, whole_evals, strict=True)]
    assert same == [False, False, True, True, True]  # what is evaluated changes no weight


SMALL = (
    "tiny --model.vocab-size 300 --model.d-model 32 --model.n-layers 2 --model.d-ff 48 "
    "--model.seq-len 32 --data.tokenizer learned --data.num-stories 200 "
    "--training.batch-size 4 --training.steps-phase1 4 --training.steps-phase2 4 "
    "--training.steps-phase3 2 --training.steps-phase4 2 "
    "--training.batch-size-phase3 2 --training.batch-size-phase4 2 --training.eval-tokens 400 "
    "--training.sample-tokens 4 --training.checkpoint-every 1 --device cpu"
)


@pytest.fixture
def parse(base_run, tmp_path):
    """A function from a command line to its run, as train.py parses it."""
    args = f"{SMALL} --data.cache {base_run.data.cache} --out {tmp_path / 'run'}"
    return lambda flags="": parse_run(f"{args} {flags}".split(), adopt_run_settings)


def test_what_a_command_leaves_out_stays_as_the_run_was_left(parse):
    stop_run(parse(), 2)
    assert parse("--resume") == replace(parse(), resume=True)
    changed = parse("--resume --training.lr-phase1 1e-3 --training.grad-clip 0.5")
    stop_run(changed, 1)
    assert parse("--resume") == changed
    back = parse("--resume --training.lr-phase1 5e-3")
    assert back == train_with(changed, lr_phase1=5e-3)
    stop_run(back, 1)
    events = read_history(back.out / HISTORY_FILE)
    changes = [(e["step"], e["setting"], e["new"]) for e in select_events(events, "change")]
    assert changes == [
        (2, "training.grad_clip", 0.5),
        (2, "training.lr_phase1", 1e-3),
        (3, "training.lr_phase1", 5e-3),
    ]
    main(parse("--resume"))
    assert select_events(read_history(back.out / HISTORY_FILE), "change")[-1]["step"] == 3


def test_a_finished_run_says_what_another_command_has_otherwise(parse, base_run, tmp_path, capsys):
    main(parse())
    text = tmp_path / "other.txt"
    text.write_text("Once upon a time there was a dog. " * 2000)
    before = snapshot_folder(tmp_path / "run")
    for flags, difference in {
        "--training.lr-phase1 1e-3": "training.lr_phase1 was 0.005, is 0.001",
        "--training.steps-phase4 9": "training.steps_phase4 was 2, is 9",
        "--seed 4 --model.d-ff 64": "model.d_ff was 48, is 64; seed was 0, is 4",
        f"--data.source {text}": "corpus (fingerprint) was ",
    }.items():
        code, output, error = capture_command(lambda f=flags: main(parse(f"--resume {f}")), capsys)
        assert code == 2 and "holds a finished run, which cannot go on as another" in error
        assert difference in error and "valid loss" not in output
        command = f"python train.py single --init-from {tmp_path}/run/large_moe_final.pt"
        assert f"{command} --out {tmp_path}/run-more" in error
    code, output, _ = capture_command(lambda: main(parse("--resume --data.cache other")), capsys)
    assert code == 0 and "valid loss" in output
    assert snapshot_folder(tmp_path / "run") == before


def test_a_run_of_a_users_file_goes_on_as_one_of_a_preset_does(base_run, tmp_path, capsys):
    file, out = tmp_path / "own.py", tmp_path / "run"
    flags = SMALL.replace("tiny", f"--data.source builtin --data.cache {base_run.data.cache}")
    flags = re.sub(r"--training\.\S*(phase\d|batch-size) \d+", "", flags)

    def parse(more="", phase="a"):
        file.write_text(
            "from config import InputError, Phase, Run\n"
            f"def own() -> Run: return Run(phases={{'{phase}': Phase(steps=4, batch_size=4)}})"
        )
        return parse_run([str(file), *f"{flags} --out {out} {more}".split()], adopt_run_settings)

    stop_run(parse(), 2)
    changed = parse("--resume --phases.a.lr 1e-3")
    stop_run(changed, 1)
    assert parse("--resume") == changed
    code, _, error = capture_command(lambda: main(parse("--resume", phase="b")), capsys)
    assert code == 2 and "holds another run" in error and "phases was ['a'], is ['b']" in error
    main(parse("--resume"))
    assert is_finished(out)


@pytest.mark.parametrize("phase, checkpoint_every", [(1, "5min"), (2, "5min"), (2, "1")])
def test_who_does_what_a_run_says_whose_loss_is_not_finite_goes_on(
    phase, checkpoint_every, parse, capsys
):
    flags = f"--training.checkpoint-every {checkpoint_every} --training.lr-phase{phase} 1e30"
    code, _, error = capture_command(lambda: main(parse(flags)), capsys)
    found = re.search(r" is nan; choose a lower (--[\w.-]+) than 1e\+30; .* (--\w+)", error)
    assert code == 1 and found and found[1] == f"--training.lr-phase{phase}", error
    again = parse(f"{flags} {found[1]} 1e-3 {found[2]}")
    code, _, error = capture_command(lambda: main(again), capsys)
    if checkpoint_every == "1":  # that point had been taken of weights that were of no use
        found = re.search(r"(\S+) is kept: .*; if it stops again, delete that file", error)
        assert code == 1 and found, error
        Path(found[1]).unlink()
        code, _, error = capture_command(lambda: main(again), capsys)
    assert code == 0 and not error
    assert is_finished(again.out)
