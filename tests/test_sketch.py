import os
import sys
from dataclasses import replace

import pytest
import torch

from config import Phase, TrainingConfig, Upcycle, tiny
from train import main
from utils import sketch
from utils.checkpoint import load
from utils.history import HISTORY, PLOT, read
from utils.plot import plot
from utils.sketch import SHARE, Sketch

MODEL = replace(tiny().model, vocab_size=300, d_model=32, n_layers=2, d_ff=48, seq_len=32)
TRAINING = TrainingConfig(log_every=2, eval_every=2, eval_tokens=400, sample_tokens=0)
PHASES = {
    "dense": Phase(steps=4, batch_size=2),
    "moe": Phase(Upcycle(4), steps=2, batch_size=2),
}
EVALUATIONS = 5


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketch")
    data = replace(tiny().data, num_stories=200, cache=folder / "cache")
    out = folder / "run"
    run = replace(tiny(), model=MODEL, training=TRAINING, data=data, out=out, device="cpu")
    return replace(run, phases=PHASES)


@pytest.fixture(scope="module")
def plain(small):
    main(small)
    return small.out


def outcome(folder):
    events = read(folder / HISTORY)
    events[0].pop("config")
    weights = load(folder / "moe_final.pt").state.weights
    return [{k: v for k, v in e.items() if not k.endswith("_s")} for e in events], weights


@pytest.mark.parametrize("cost", [0.3, 3.0, 40.0])
def test_drawing_takes_no_more_than_its_share_and_goes_on_all_the_while(
    cost, tmp_path, monkeypatch
):
    clock, drawn = Clock(), []

    def drawing(folders):
        drawn.append(clock.now)
        clock.now += cost

    monkeypatch.setattr(sketch, "plot", drawing)
    live = Sketch(tmp_path, clock)
    while clock.now < 20_000:
        clock.now += 7
        live.update()
        assert drawn[1:] == [] or len(drawn) * cost <= SHARE * clock.now
    assert drawn[-1] > 15_000 and len(drawn) * cost > 0.8 * SHARE * clock.now


def test_the_curves_are_drawn_at_evaluations_and_the_run_is_the_same_bit_for_bit(
    small, plain, tmp_path, monkeypatch
):
    sizes = []

    def drawing(folders):
        assert plot(folders).read_bytes().startswith(b"\x89PNG")
        sizes.append(len(read(folders[0] / HISTORY)))

    monkeypatch.setattr(sketch, "SHARE", float("inf"))
    monkeypatch.setattr(sketch, "plot", drawing)
    run = replace(small, out=tmp_path / "run")
    main(run)
    assert len(sizes) == EVALUATIONS and sizes == sorted(set(sizes))
    (told, weights), (wanted, wanted_weights) = outcome(run.out), outcome(plain)
    assert told == wanted
    assert all(torch.equal(weights[name], wanted_weights[name]) for name in wanted_weights)
    assert not list(run.out.glob(".*"))


def test_a_drawing_that_fails_warns_once_and_the_run_goes_on(
    small, plain, tmp_path, monkeypatch, capsys
):
    def full(folders):
        raise OSError("No space left on device")

    monkeypatch.setattr(sketch, "SHARE", float("inf"))
    for module in (sketch, sys.modules["train"]):
        monkeypatch.setattr(module, "plot", full)
    run = replace(small, out=tmp_path / "run")
    main(run)
    said = capsys.readouterr()
    warnings = [line for line in (said.out + said.err).splitlines() if "warning" in line]
    assert warnings == 2 * [
        f"warning: drawing {run.out / PLOT} failed (OSError: No space left on device); "
        "the run goes on without it"
    ], "one while it goes on, one at its end"
    assert "curves:" not in said.out
    assert outcome(run.out)[0] == outcome(plain)[0]


def test_a_run_killed_between_its_end_and_its_last_picture_gets_that_on_a_resume(plain, small):
    picture = plain / PLOT
    whole = picture.read_bytes()
    picture.write_bytes(b"of its middle")
    os.utime(picture, ns=(0, 0))
    for _ in range(2):
        main(replace(small, resume=True))
        assert picture.read_bytes() == whole == plot([plain], plain / "again.png").read_bytes()
        (plain / "again.png").unlink()
