"""A checkpoint is read back bit for bit, or refused by name."""

import io
import random
import zipfile
from dataclasses import asdict, replace

import pytest
import torch
from torch.testing import assert_close

from config import Deepen, InputError, ModelConfig, Tolerance, Upcycle, Widen
from models import SLM
from tests.helpers.damage import snapshot_folder
from tests.helpers.small_models import DENSE, MOE, random_model, windows
from transfer import TrainState
from utils.checkpoint.model import (
    CHECKPOINT_SCHEMA,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from utils.text.special_tokens import SpecialTokens

resource = pytest.importorskip("resource")

GROWTHS = (
    Upcycle(5, 2),
    Widen(3, noise=0.5, tolerance=Tolerance(max_loss_drift=1.0)),
    Deepen(2, "end"),
)


SPECIAL_TOKENS = SpecialTokens((7, 3), 1, "{{ x }}")


def make_checkpoint(config: ModelConfig = DENSE, **fields) -> Checkpoint:
    weights = TrainState.from_model(random_model(config).float()).weights
    return Checkpoint(config, weights, '{"a": "\\u00f6"}', SPECIAL_TOKENS, **fields)


def torch_file(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FOREIGN_FILES = {
    "prose": b"Once upon a time",
    "text that unpickles in part": b"hello\n",
    "a byte": b"\x80",
    "the head of a zip file": b"PK\x03\x04",
    "noise": random.Random(0).randbytes(5000),
    "a list": torch_file([1]),
    "a tensor": torch_file(torch.ones(2)),
    "a whole module": torch_file(SLM(DENSE)),
    "weights alone": torch_file(SLM(DENSE).state_dict()),
    "a format of another program": torch_file({"model": {}, "format": "pt"}),
    "another schema": torch_file({"schema": CHECKPOINT_SCHEMA + 1, "config": {}}),
    "nothing but the schema": torch_file({"schema": CHECKPOINT_SCHEMA}),
    "fields of another program": torch_file({"schema": CHECKPOINT_SCHEMA, "config": {"n_embd": 3}}),
}


def assert_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        load_checkpoint(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_what_was_saved_is_loaded_bit_for_bit(config, tmp_path):
    before = make_checkpoint(
        config,
        growth_history=GROWTHS,
        probe=windows(config),
        phase_name="wide",
        tokens=2**40,
        seed=3,
        load_balance_coef=0.25,
        init_from="org/model",
    )
    save_checkpoint(tmp_path / "a.pt", before)
    after = load_checkpoint(tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert replace(after, weights={}, probe=None) == replace(before, weights={}, probe=None)
    assert list(after.weights) == list(before.weights)
    assert_close(after.weights, before.weights, rtol=0, atol=0)
    assert_close(after.probe, before.probe)
    tokens = windows(config)[:, :-1]
    logits = before.state.model()(tokens).logits
    assert_close(after.state.model()(tokens).logits, logits, rtol=0, atol=0)


def test_what_was_left_out_is_still_left_out(tmp_path):
    before = make_checkpoint()
    save_checkpoint(tmp_path / "a.pt", before)
    after = load_checkpoint(tmp_path / "a.pt")
    assert replace(after, weights={}) == replace(before, weights={})
    assert (after.growth_history, after.probe, after.tokens) == ((), None, 0)


def test_a_checkpoint_is_whole_to_whoever_reads_zip_archives(tmp_path):
    save_checkpoint(tmp_path / "a.pt", make_checkpoint())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None


def test_torch_alone_reads_the_file_without_running_code(tmp_path):
    before = make_checkpoint(growth_history=GROWTHS)
    save_checkpoint(tmp_path / "a.pt", before)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["schema"] == CHECKPOINT_SCHEMA and content["config"] == asdict(DENSE)
    assert content["growth_history"][1] == {"operator": "Widen", **asdict(GROWTHS[1])}
    model = SLM(DENSE)
    model.load_state_dict(content["weights"])
    assert_close(TrainState.from_model(model).weights, before.weights, rtol=0, atol=0)


def test_a_checkpoint_takes_no_more_room_than_its_weights(tmp_path):
    before = make_checkpoint()
    size = sum(weight.nbytes for weight in before.weights.values())
    save_checkpoint(tmp_path / "a.pt", before)
    assert size < (tmp_path / "a.pt").stat().st_size < size + 500 * (len(before.weights) + 10)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_checkpoint_cut_short_is_refused(fraction, tmp_path):
    save_checkpoint(tmp_path / "a.pt", make_checkpoint())
    whole = (tmp_path / "a.pt").read_bytes()
    assert_refused(tmp_path / "b.pt", whole[: int(fraction * len(whole))])


@pytest.mark.parametrize("content", FOREIGN_FILES.values(), ids=FOREIGN_FILES)
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    assert_refused(tmp_path / "a.pt", content)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(InputError, match=f"^{path}: there is no such checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_a_disk_that_is_full_leaves_the_old_checkpoint_as_it_was(room, tmp_path):
    path, new = tmp_path / "a.pt", make_checkpoint(MOE)
    save_checkpoint(path, make_checkpoint())
    before = snapshot_folder(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(path, new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot_folder(tmp_path) == before
    save_checkpoint(path, new)
    assert load_checkpoint(path).config == MOE


def test_an_unwritable_place_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="none"):
        save_checkpoint(tmp_path / "none" / "a.pt", make_checkpoint())
    assert not list(tmp_path.iterdir())
