"""Damaged checkpoints: one line that names the file, an exit code, and nothing else changes."""

import io
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import test_crash
import torch
from damage import Q, changed, code_of, flip, poisoned, sealed, tree

from config import InputError
from transfer.verify_growth_mechanics import compare_checkpoints
from utils import generate
from utils.checkpoint import load
from utils.files import DIGITS, MARK

start, small, whole = test_crash.start, test_crash.small, test_crash.whole


def zipped(pickled):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def weight(name, value):
    return lambda content: content["weights"].__setitem__(name, value)


SUM = "is damaged or no checkpoint: its checksum does not match"
MALICE = b"cos\nmkdir\n(S'payload'\ntR."
DAMAGE = {
    "empty": (lambda data: b"", SUM),
    "one byte": (lambda data: data[:1], SUM),
    "half of it": (lambda data: data[: len(data) // 2], SUM),
    "the last byte missing": (lambda data: data[:-1], SUM),
    "without its seal": (lambda data: data[: -len(MARK) - DIGITS], SUM),
    "a byte too many": (lambda data: data + b"0", SUM),
    "zeros": (lambda data: bytes(len(data)), SUM),
    "text": (lambda data: b"Once upon a time", SUM),
    "sealed text": (lambda data: sealed(b"Once upon a time"), "is no checkpoint"),
    "a foreign file": (lambda data: zipped(pickle.dumps([1])), SUM),
    "a sealed foreign file": (lambda data: sealed(zipped(pickle.dumps([1]))), "is no checkpoint"),
    "a bit of the header": (lambda data: flip(data, 2), SUM),
    "a bit of the pickle": (lambda data: flip(data, data.index(b"q_proj")), SUM),
    "a bit of the tensors": (lambda data: flip(data, len(data) // 2), SUM),
    "a bit of the zip directory": (lambda data: flip(data, data.rindex(b"PK\x01\x02") + 9), SUM),
    "a bit of the zip's end": (lambda data: flip(data, data.rindex(b"PK\x05\x06")), SUM),
    "a bit of the mark": (lambda data: flip(data, data.rindex(MARK)), SUM),
    "a bit of the checksum": (lambda data: flip(data, len(data) - 1), SUM),
    "malice": (lambda data: MALICE, SUM),
    "zipped malice": (lambda data: zipped(MALICE), SUM),
    "sealed malice": (lambda data: sealed(MALICE), "is no checkpoint (UnpicklingError)"),
    "sealed zipped malice": (
        lambda data: sealed(zipped(MALICE)),
        "is no checkpoint (UnpicklingError)",
    ),
    "a parameter missing": (
        lambda data: changed(data, lambda content: content["weights"].pop(Q)),
        f"{Q} is missing",
    ),
    "a parameter too many": (
        lambda data: changed(data, weight("extra", torch.ones(2))),
        "extra is no parameter of this model",
    ),
    "another shape": (
        lambda data: changed(data, weight(Q, torch.ones(32, 31))),
        f"{Q} is (32, 31), not (32, 32)",
    ),
    "no tensor": (lambda data: changed(data, weight(Q, 3.0)), Q),
    "weights that are a list": (
        lambda data: changed(data, lambda content: content.update(weights=[1])),
        "no checkpoint",
    ),
    "NaN": (lambda data: changed(data, poisoned(float("nan"))), f"{Q} is not finite"),
    "infinity": (lambda data: changed(data, poisoned(float("inf"))), f"{Q} is not finite"),
    "another schema": (
        lambda data: changed(data, lambda content: content.update(schema=99)),
        "is no checkpoint of schema 1 (schema = 99)",
    ),
    "no tokenizer": (
        lambda data: changed(data, lambda content: content.pop("tokenizer")),
        "is no checkpoint of this program",
    ),
    "a configuration of another program": (
        lambda data: changed(data, lambda content: content["config"].update(n_embd=3)),
        "is no checkpoint of this program",
    ),
}


@pytest.fixture
def bad(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, _ = whole[0]
    Path("good.pt").write_bytes(files["dense_model.pt"])

    def bad(change):
        Path("bad.pt").write_bytes(change(files["dense_model.pt"]))
        return tree(tmp_path)

    return bad


@pytest.mark.parametrize("change, says", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_by_whoever_reads_it(
    change, says, bad, tmp_path, capsys, monkeypatch
):
    before = bad(change)
    code, said = code_of(lambda: generate.main(Path("bad.pt"), "Once", device="cpu"), capsys)
    assert code == 2 and said.startswith("error: bad.pt") and says in said
    with pytest.raises(InputError) as raised:
        compare_checkpoints(Path("bad.pt"), Path("good.pt"))
    assert f"error: {raised.value}\n" == said
    assert tree(tmp_path) == before


def test_no_single_bit_goes_unnoticed(bad):
    chance = random.Random(0)
    size = Path("good.pt").stat().st_size
    for _ in range(200):
        bad(lambda data: flip(data, chance.randrange(size)))
        with pytest.raises(InputError, match=r"^bad.pt is damaged"):
            load(Path("bad.pt"))


def test_a_missing_checkpoint_and_a_folder_are_none(bad, tmp_path, capsys):
    for path in (Path("none.pt"), tmp_path):
        code, said = code_of(lambda path=path: generate.main(path, "Once"), capsys)
        assert code == 2 and said.startswith(f"error: {path}: there is no such ")
