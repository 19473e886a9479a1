"""A model at rest: in a file, and between two phases."""

import io
import random
import zipfile
from dataclasses import replace

import pytest
import torch
from small import DENSE, MOE, next_token_loss, trained_like, windows
from torch.testing import assert_close

from config import Deepen, InputError, TrainingConfig, Upcycle, Widen
from models import SLM
from transfer import State
from utils.checkpoint import SCHEMA, Checkpoint, load, save
from utils.files import load_tensors, save_tensors
from utils.optimizer import wake

resource = pytest.importorskip("resource")

GROWTH = (Upcycle(5, 2), Widen(3, noise=0.5, max_loss_drift=1.0), Deepen(2, "end"))


def checkpoint(config=DENSE, **changes):
    weights = State.of(trained_like(config).float()).weights
    return Checkpoint(config, weights, '{"a": "\\u00f6"}', 7, **changes)


def saved(path, *contents):
    """The bytes of a whole checkpoint."""
    save(path, checkpoint(*contents))
    return path.read_bytes()


def as_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FOREIGN = {
    "prose": b"Once upon a time",
    "text that unpickles in part": b"hello\n",
    "a byte": b"\x80",
    "the head of a zip file": b"PK\x03\x04",
    "noise": random.Random(0).randbytes(5000),
    "a list": as_file([1]),
    "a tensor": as_file(torch.ones(2)),
    "a whole module": as_file(SLM(DENSE)),
    "weights alone": as_file(SLM(DENSE).state_dict()),
    "a format of another program": as_file({"model": {}, "format": "pt"}),
    "another format": as_file({"schema": SCHEMA + 1, "config": {}}),
    "nothing but the format": as_file({"schema": SCHEMA}),
    "fields of another program": as_file({"schema": SCHEMA, "config": {"n_embd": 3}}),
}


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_what_was_saved_is_loaded_bit_for_bit(config, tmp_path):
    told = {"phase_name": "wide", "tokens": 2**40, "seed": -3}
    before = checkpoint(config, growth=GROWTH, probe=windows(config), **told)
    save(tmp_path / "a.pt", before)
    after = load(tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert replace(after, weights={}, probe=None) == replace(before, weights={}, probe=None)
    assert torch.equal(after.probe, before.probe)
    assert list(after.weights) == list(before.weights)
    assert all(torch.equal(after.weights[name], old) for name, old in before.weights.items())
    tokens = windows(config)[:, :-1]
    want = before.state.model()(tokens).logits
    assert torch.equal(after.state.model()(tokens).logits, want)


def test_a_checkpoint_is_whole_to_whoever_reads_zip_archives(tmp_path):
    before = checkpoint()
    save_tensors(tmp_path / "kept.pt", before.weights, zip_sums=False)
    save(tmp_path / "a.pt", before)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
    assert_close(load_tensors(tmp_path / "kept.pt"), before.weights, rtol=0, atol=0)


def test_what_was_left_out_is_still_left_out(tmp_path):
    save(tmp_path / "a.pt", checkpoint())
    after = load(tmp_path / "a.pt")
    assert (after.growth, after.probe, after.phase_name, after.tokens) == ((), None, "", 0)


def test_torch_alone_reads_the_file_without_running_code(tmp_path):
    save(tmp_path / "a.pt", checkpoint(growth=GROWTH))
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["config"]["d_model"] == DENSE.d_model and content["schema"] == SCHEMA
    assert content["growth"][1] == {"how": "Widen", **vars(GROWTH[1])}
    SLM(DENSE).load_state_dict(content["weights"])


def test_a_model_that_is_saved_takes_no_more_room_than_its_weights(tmp_path):
    before = checkpoint()
    whole = sum(weight.numel() * 4 for weight in before.weights.values())
    save(tmp_path / "a.pt", before)
    assert (tmp_path / "a.pt").stat().st_size < whole + 500 * (len(before.weights) + 10)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_checkpoint_cut_short_is_refused(share, tmp_path):
    whole = saved(tmp_path / "a.pt")
    refused(tmp_path / "b.pt", whole[: int(share * len(whole))])


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    refused(tmp_path / "a.pt", content)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(InputError, match=f"^{path}: there is no such checkpoint"):
            load(path)


@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_a_disk_that_is_full_leaves_the_old_checkpoint_as_it_was(room, tmp_path):
    old = saved(tmp_path / "a.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            save(tmp_path / "a.pt", checkpoint(MOE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == old
    save(tmp_path / "a.pt", checkpoint(MOE))
    assert load(tmp_path / "a.pt").config == MOE


def test_an_unwritable_place_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="none"):
        save(tmp_path / "none" / "a.pt", checkpoint())
    assert not list(tmp_path.iterdir())


def test_training_goes_on_after_a_rest_as_if_there_had_been_none():
    ends = []
    for rests in (False, True):
        torch.manual_seed(0)
        optimizer = wake(State.of(SLM(DENSE)), TrainingConfig(), torch.float32)
        for seed in range(4):
            if rests:
                optimizer = wake(optimizer.rest(), TrainingConfig(), torch.float32)
            optimizer.set_lr(1e-3)
            next_token_loss(optimizer.model, windows(DENSE, seed=seed)).backward()
            optimizer.step()
        ends.append(optimizer.rest())
    for name, weight in ends[0].weights.items():
        assert torch.equal(ends[1].weights[name], weight)
        assert all(torch.equal(ends[1].adam[name][key], m) for key, m in ends[0].adam[name].items())


def test_gains_are_not_decayed_and_all_else_is():
    optimizer = wake(State.of(SLM(DENSE)), TrainingConfig(weight_decay=0.5), torch.float32)
    model = optimizer.model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer.set_lr(0.1)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        kept = 1.0 if name.endswith("norm.weight") else 0.95
        assert_close(weight.detach(), kept * before[name])
