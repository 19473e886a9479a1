"""A damaged checkpoint is named in one line by whoever reads it, and nothing else changes."""

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from config import InputError, tiny
from models import SLM
from tests.helpers.damage import (
    PARAM,
    add_checksum,
    capture_command,
    edit_content,
    flip_bit,
    set_one_weight,
    snapshot_folder,
)
from tests.helpers.small_runs import MODEL
from transfer import TrainState
from transfer.proof import compare_checkpoints
from utils.checkpoint.model import (
    CHECKPOINT_SCHEMA,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from utils.generate.__main__ import main as generate_main
from utils.runtime.atomic_io import ADD_CHECKSUM, CHECKSUM_TAG, checksum_trailer
from utils.text.builtin.stories import builtin_stories
from utils.text.special_tokens import SpecialTokens
from utils.text.tokenizer import learn_tokenizer, read_tokenizer
from utils.training.init_from import find_own_checkpoint


def zip_pickle(pickled: bytes) -> bytes:
    """Returns a zip archive such as torch saves, around a pickle of another program's."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def set_param(name: str, value: object):
    return lambda content: content["weights"].__setitem__(name, value)


NO_SUM = "bad.pt: its checksum is missing, as where torch.save has written it again; --unchecked "
WRONG_SUM = "is damaged or no checkpoint: its checksum does not match"
NO_CHECKPOINT = "is no checkpoint"
FOREIGN_FIELDS = "is no checkpoint of this program"
EXPLOIT = b"cos\nmkdir\n(S'payload'\ntR."
"""A pickle that makes a folder when it is loaded by a reader that runs code."""
FILE_DAMAGES = {
    "empty": (lambda data: b"", WRONG_SUM),
    "one byte": (lambda data: data[:1], WRONG_SUM),
    "half of it": (lambda data: data[: len(data) // 2], WRONG_SUM),
    "the last byte missing": (lambda data: data[:-1], WRONG_SUM),
    "without its checksum": (lambda data: data[: -len(checksum_trailer(0))], NO_SUM),
    "a byte too many": (lambda data: data + b"0", WRONG_SUM),
    "zeros": (lambda data: bytes(len(data)), WRONG_SUM),
    "text": (lambda data: b"Once upon a time", WRONG_SUM),
    "text with a checksum": (lambda data: add_checksum(b"Once upon a time"), NO_CHECKPOINT),
    "a foreign file": (lambda data: zip_pickle(pickle.dumps([1], 2)), NO_SUM),
    "a foreign file with a checksum": (
        lambda data: add_checksum(zip_pickle(pickle.dumps([1], 2))),
        NO_CHECKPOINT,
    ),
    "a bit of the header": (lambda data: flip_bit(data, 2), WRONG_SUM),
    "a bit of the pickle": (lambda data: flip_bit(data, data.index(b"q_proj")), WRONG_SUM),
    "a bit of the tensors": (lambda data: flip_bit(data, len(data) // 2), WRONG_SUM),
    "a bit of the zip directory": (
        lambda data: flip_bit(data, data.rindex(b"PK\x01\x02") + 9),
        WRONG_SUM,
    ),
    "a bit of the zip's end": (lambda data: flip_bit(data, data.rindex(b"PK\x05\x06")), WRONG_SUM),
    "a bit of the tag": (lambda data: flip_bit(data, data.rindex(CHECKSUM_TAG)), WRONG_SUM),
    "a bit of the checksum": (lambda data: flip_bit(data, len(data) - 1), WRONG_SUM),
    "an exploit": (lambda data: EXPLOIT, WRONG_SUM),
    "a zipped exploit": (lambda data: zip_pickle(EXPLOIT), NO_SUM),
    "an exploit with a checksum": (
        lambda data: add_checksum(EXPLOIT),
        "is no checkpoint (UnpicklingError)",
    ),
    "a zipped exploit with a checksum": (
        lambda data: add_checksum(zip_pickle(EXPLOIT)),
        "is no checkpoint (UnpicklingError)",
    ),
}
CONTENT_EDITS = {
    "a parameter missing": (
        lambda content: content["weights"].pop(PARAM),
        f"{PARAM} is missing",
    ),
    "a parameter too many": (
        set_param("extra", torch.ones(2)),
        "extra is no parameter of this model",
    ),
    "another shape": (set_param(PARAM, torch.ones(32, 31)), f"{PARAM} is (32, 31), not (32, 32)"),
    "no tensor": (set_param(PARAM, 3.0), f"{PARAM} is no tensor"),
    "weights that are a list": (
        lambda content: content.update(weights=[1]),
        "is no checkpoint: its weights have no names",
    ),
    "NaN": (set_one_weight(float("nan")), f"{PARAM} is not finite"),
    "infinity": (set_one_weight(float("inf")), f"{PARAM} is not finite"),
    "another schema": (
        lambda content: content.update(schema=99),
        f"is no checkpoint of schema {CHECKPOINT_SCHEMA} (schema = 99)",
    ),
    "no tokenizer": (lambda content: content.pop("tokenizer"), FOREIGN_FIELDS),
    "a configuration of another program": (
        lambda content: content["config"].update(n_embd=3),
        FOREIGN_FIELDS,
    ),
    "a configuration that no model can have": (
        lambda content: content["config"].update(n_heads=5),
        FOREIGN_FIELDS,
    ),
    "an operator of another program": (
        lambda content: content.update(growth_history=[{"operator": "Shrink"}]),
        FOREIGN_FIELDS,
    ),
}


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    """The bytes of a checkpoint."""
    path = tmp_path_factory.mktemp("whole") / "whole.pt"
    tokenizer = learn_tokenizer(builtin_stories(50), MODEL.vocab_size).to_str()
    torch.manual_seed(0)
    weights = TrainState.from_model(SLM(MODEL)).weights
    probe = torch.randint(MODEL.vocab_size, (2, MODEL.seq_len + 1))
    save_checkpoint(path, Checkpoint(MODEL, weights, tokenizer, SpecialTokens((0,)), probe=probe))
    return path.read_bytes()


@pytest.fixture
def folder(whole_file, tmp_path, monkeypatch):
    """The working folder, which holds a good checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("good.pt").write_bytes(whole_file)
    return tmp_path


def assert_refused(data, phrase, folder, capsys):
    """Every reader says what is wrong with a file of these bytes, and nothing else changes."""
    Path("bad.pt").write_bytes(data)
    before = snapshot_folder(folder)
    command = partial(generate_main, Path("bad.pt"), ("Once",), device="cpu")
    code, _, error = capture_command(command, capsys)
    assert code == 2 and error.startswith("error: bad.pt") and phrase in error
    with pytest.raises(InputError) as raised:
        compare_checkpoints(Path("bad.pt"), Path("good.pt"))
    assert f"error: {raised.value}\n" == error
    assert snapshot_folder(folder) == before


@pytest.mark.parametrize("damage, phrase", FILE_DAMAGES.values(), ids=FILE_DAMAGES)
def test_a_damaged_file_is_named_by_whoever_reads_it(damage, phrase, folder, whole_file, capsys):
    assert_refused(damage(whole_file), phrase, folder, capsys)


@pytest.mark.parametrize("edit, phrase", CONTENT_EDITS.values(), ids=CONTENT_EDITS)
def test_a_whole_file_with_other_content_is_named_by_whoever_reads_it(
    edit, phrase, folder, whole_file, capsys
):
    assert_refused(edit_content(whole_file, edit), phrase, folder, capsys)


def test_a_whole_checkpoint_is_read(folder, capsys):
    command = partial(generate_main, Path("good.pt"), ("Once",), length=3, device="cpu")
    code, output, error = capture_command(command, capsys)
    assert code == 0 and output.startswith("> Once\n") and not error
    assert compare_checkpoints(Path("good.pt"), Path("good.pt"))


def test_a_checkpoint_that_torch_has_saved_again_is_read_if_asked_to(folder, whole_file, capsys):
    torch.save(torch.load("good.pt", weights_only=True), "again.pt")
    stories = []
    for path in (Path("good.pt"), Path("again.pt")):
        generate_main(path, ("Once",), length=3, device="cpu", unchecked=True)
        stories.append(capsys.readouterr().out)
    assert stories[0] == stories[1] != ""
    assert compare_checkpoints(Path("good.pt"), Path("again.pt"), unchecked=True)
    assert_refused(Path("again.pt").read_bytes(), NO_SUM, folder, capsys)


@pytest.mark.parametrize(
    "read",
    [
        lambda: find_own_checkpoint(replace(tiny(), init_from="bad.pt")),
        lambda: read_tokenizer("bad.pt"),
    ],
    ids=["init_from", "data.tokenizer"],
)
def test_a_reader_without_the_option_says_how_to_add_a_checksum(read: Callable[[], object], folder):
    path = Path("bad.pt")
    torch.save(torch.load("good.pt", weights_only=True), path)
    with pytest.raises(InputError) as raised:
        read()
    assert str(raised.value).endswith(f"torch.save has written it again{ADD_CHECKSUM}")
    assert "--unchecked" not in ADD_CHECKSUM
    save_checkpoint(path, load_checkpoint(path, unchecked=True))
    assert read()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: flip_bit(data, len(data) // 2),
        lambda data: flip_bit(data, data.rindex(CHECKSUM_TAG)),
        lambda data: zip_pickle(EXPLOIT),
    ],
    ids=["half of it", "a bit of the tensors", "a bit of the tag", "a zipped exploit"],
)
def test_only_a_missing_checksum_is_excused(damage, folder, whole_file):
    Path("bad.pt").write_bytes(damage(whole_file))
    with pytest.raises(InputError, match=r"^bad.pt is (damaged|no checkpoint)"):
        load_checkpoint(Path("bad.pt"), unchecked=True)
    assert not Path("payload").exists()


def test_no_single_bit_of_a_checkpoint_goes_unnoticed(folder, whole_file):
    chance = random.Random(0)
    for _ in range(200):
        Path("bad.pt").write_bytes(flip_bit(whole_file, chance.randrange(len(whole_file))))
        with pytest.raises(InputError, match=r"^bad.pt is damaged"):
            load_checkpoint(Path("bad.pt"))


def test_a_missing_checkpoint_and_a_folder_without_a_run_are_none(folder, capsys):
    phrases = {Path("none.pt"): ": there is no such ", folder: " holds no run (there is no "}
    for path, phrase in phrases.items():
        command = partial(generate_main, path, ("Once",), device="cpu")
        code, _, error = capture_command(command, capsys)
        assert code == 2 and error.startswith(f"error: {path}{phrase}")
