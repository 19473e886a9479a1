"""Bad input and damaged files: one line that names it, an exit code, and nothing else changes."""

import io
import pickle
import random
import re
import shutil
import signal
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import test_crash
import torch
from test_crash import FOUR, MODEL, finish, left

from config import InputError, Phase, Widen
from train import main
from transfer.verify_growth_mechanics import compare_checkpoints
from utils import generate
from utils.checkpoint import load
from utils.cli import parse, run_command
from utils.files import DIGITS, MARK, load_tensors
from utils.history import HISTORY, read
from utils.output import check_disk
from utils.resume import FOLDER
from utils.schedule import Stage, check_memory

start, small, whole, run = (getattr(test_crash, n) for n in ("start", "small", "whole", "run"))
SIZES = (
    "--model.vocab-size 300 --model.d-model 32 --model.n-layers 2 --model.seq-len 32 --device cpu"
)
SIZES += " --data.num-stories 200 --training.batch-size 4 --data.tokenizer learned"
COMMANDS = {
    "--device cuda:99": "device = cuda:99 is not there",
    "--device gpu": "device = gpu is not there",
    "--out FILE": "FILE is a file",
    "--out FILE/run/deeper": "FILE is a file",
    "--data.source nowhere": "data.source = nowhere: no such file or folder",
    "--data.source EMPTY.txt": "there is no text in it",
    "--data.source FOLDER": "the folder holds no .txt",
    "--data.source SHORT.txt": "shorter than one context (model.seq_len = 32 + 1)",
    "--data.source LATIN.txt": "LATIN.txt is not UTF-8",
    "--data.source CUT.txt.gz": "CUT.txt.gz is a damaged gzip file",
    "--data.source FILE": "data.source = FILE is not a .txt",
    "--data.tokenizer ./FOLDER": "no such folder with a tokenizer.json",
    "--data.tokenizer ./BROKEN": "tokenizer.json is damaged",
    "--model.vocab-size 256": "has 257 tokens, more than model.vocab_size = 256 has room for",
    "--data.cache FILE/x": "data.cache = FILE/x: cannot be written",
    "--data.num-stories -1": "data.num_stories = -1 is negative",
    "--data.holdout 1": "data.holdout = 1.0 must lie between 0 and 1",
    "--model.n-heads 3": "model.n_heads = 3 does not divide model.d_model = 32",
    "--model.n-kv-heads 4": "model.n_kv_heads = 4 does not divide model.n_heads = 2",
    "--model.n-heads 32": "rotary positions need an even head size",
    "--model.num-experts 2 --model.top-k 3": "model.top_k = 3 must be between 1 and",
    "--model.n-layers 0": "model.n_layers = 0 must be at least 1",
    "--model.num-experts 4": "phase 2 (moe): ",
    "--training.upcycle.top-k 5": "top_k = 5 must be between 1 and num_experts = 4",
    "--training.deepen.extra-layers -1": "extra_layers = -1 is negative",
    "--training.widen.noise nan": "noise = nan must be finite and not negative",
    "--training.micro-batch-size 3": "training.micro_batch_size = 3 does not divide the batch of 4",
    "--training.checkpoint-every 5m": "training.checkpoint_every = '5m' is neither",
    "--training.checkpoint-every 0": "training.checkpoint_every = '0' is neither",
    "--training.log-every 0": "training.log_every = 0 must be at least 1",
    "--training.lr-phase3 inf": "training.lr_phase3 = inf must be finite",
    "--training.beta2 1": "training.beta2 = 1.0 must be in [0, 1)",
    "--seed -1": "seed = -1 must be between",
    "--resume --overwrite": "resume goes on with what overwrite would remove",
}
SCHEDULES = {
    "the same checkpoint twice": (
        {"a": Phase(checkpoint="x.pt"), "b": Phase(checkpoint="x.pt")},
        "phase 2 (b): checkpoint = x.pt is also that of phase 1 (a)",
    ),
    "a checkpoint in another folder": (
        {"a": Phase(checkpoint="../x.pt")},
        "phase 1 (a): checkpoint = ../x.pt is not a file name",
    ),
    "a checkpoint that is none": (
        {"a": Phase(checkpoint="x.txt")},
        "phase 1 (a): checkpoint = x.txt is not a file name that ends in .pt",
    ),
    "a second upcycling": (
        {"a": Phase(FOUR.upcycle), "b": Phase(Widen()), "c": Phase(FOUR.upcycle)},
        "phase 3 (c): ",
    ),
}


def tree(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
        if path.name != "lock"
    }


def code_of(command, capsys):
    """The exit code, and the one line on stderr."""
    capsys.readouterr()
    try:
        run_command(command)
        code = 0
    except SystemExit as leaves:
        code = leaves.code
    said = capsys.readouterr().err
    assert said.count("\n") <= 1, said
    return code, said


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files of every kind that no run can use; the names in COMMANDS."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("FOLDER", "BROKEN"):
        (folder / name).mkdir()
    (folder / "FILE").write_text("no folder")
    (folder / "BROKEN" / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    for name, content in {
        "EMPTY": b"",
        "SHORT": b"Once.<|endoftext|>Twice.",
        "LATIN": b"caf\xe9 " * 100,
    }.items():
        (folder / f"{name}.txt").write_bytes(content)
    (folder / "CUT.txt.gz").write_bytes(b"\x1f\x8b\x08\x00nothing")
    return folder


@pytest.mark.parametrize("args, says", COMMANDS.items(), ids=COMMANDS)
def test_what_cannot_be_run_is_one_line_and_leaves_all_as_it_was(
    args, says, inputs, small, capsys, monkeypatch
):
    monkeypatch.chdir(inputs)
    base = f"tiny {SIZES} --data.cache {small.data.cache} --out out"
    before = tree(inputs)
    code, said = code_of(lambda: main(parse([*base.split(), *args.split()])), capsys)
    assert code == 2 and said.startswith("error: ") and says in said
    assert tree(inputs) == before


@pytest.mark.parametrize("phases, says", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_does_not_fit_names_the_phase(phases, says, run, capsys):
    refused = replace(run, phases=phases, training=test_crash.BRIEF)
    code, said = code_of(lambda: main(refused), capsys)
    assert code == 2 and says in said and not run.out.exists()


@pytest.mark.parametrize("check, says", [
    (lambda stage, run: check_disk(run.out, [stage]), "the checkpoints need"),
    (lambda stage, run: check_memory([stage], run, torch.device("cpu")), "phase 1 (huge) needs"),
], ids=["disk", "memory"])  # fmt: skip
def test_what_cannot_fit_is_known_before_it_begins(check, says, run):
    stage = Stage(1, "huge", Phase(), replace(MODEL, d_model=1 << 20), 0, 0, 0.0)
    with pytest.raises(InputError) as raised:
        check(stage, run)
    assert says in str(raised.value) and " GB" in str(raised.value)


def sealed(data):
    """As the program itself would have ended the file."""
    return data + MARK + b"%0*x" % (DIGITS, zlib.crc32(data))


def zipped(pickled):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def changed(data, change):
    """The same checkpoint, whole, with something else in it."""
    content, file = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
    change(content)
    torch.save(content, file)
    return sealed(file.getvalue())


def weight(name, value):
    return lambda content: content["weights"].__setitem__(name, value)


def poisoned(value):
    return lambda content: content["weights"][Q][0, 3:4].fill_(value)


Q = "blocks.0.attn.q_proj.weight"
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


@pytest.mark.parametrize(
    "often, room, phase",
    [("2", 200_000, 0), ("2", 500_000, 1), ("2", 2_000_000, 2), ("60min", 3_000, 0)],
)
def test_a_full_disk_stops_the_run_with_all_that_was_good_intact(
    often, room, phase, start, run, whole
):
    run = replace(run, training=replace(run.training, checkpoint_every=often))
    assert left(start(run, room=room)) == 1
    said = run.out.with_name("run-said.err").read_text()
    assert said.startswith("stopped: ") and "File too large" in said and said.count("\n") == 1
    kept = sorted(run.out.glob(f"{FOLDER}/*.pt"))
    assert len(kept) <= 2 and all(load_tensors(path)["phase"] == phase for path in kept)
    assert bool(kept) == bool(phase)
    way = f"{kept[-1]} is kept: the same command with --resume" if kept else "nothing was kept yet"
    assert way in said
    finish(start, run, whole)


@pytest.fixture(scope="module")
def half(small, start):
    """The folder of a run that was killed after four steps of its second phase."""
    run = replace(small, out=small.out.with_name("half"))
    moment = ("before train.training_step 14", signal.SIGKILL)
    assert left(start(run, moment)) == -signal.SIGKILL
    return run.out


@pytest.fixture
def killed(half, run):
    """That run, and its points: the last and the one before."""
    shutil.copytree(half, run.out)
    old, last = sorted(run.out.glob(f"{FOLDER}/*.pt"))
    assert [path.name[-6:] for path in (old, last)] == ["002.pt", "004.pt"]
    return run, last, old


POINTS = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-100],
    "one bit flipped": lambda data: flip(data, len(data) // 3),
    "of another schema": lambda data: changed(data, lambda content: content.update(schema=0)),
    "without a field": lambda data: changed(data, lambda content: content.pop("history")),
    "not finite": lambda data: changed(data, poisoned(float("nan"))),
}


@pytest.mark.parametrize("damage", POINTS.values(), ids=POINTS)
def test_a_damaged_point_is_reported_and_the_one_before_leads_to_the_same_end(
    damage, killed, start, whole
):
    run, last, _ = killed
    last.write_bytes(damage(last.read_bytes()))
    finish(start, run, whole)
    said = run.out.with_name("run-said.out").read_text()
    assert f"{last}" in said and "trying the one before" in said
    assert "going on at phase 2, step 2" in said


def refused(run, start, *says):
    """With exit code 2 and one line that `says` what is wrong, and nothing changed."""
    before = tree(run.out)
    assert left(start(run)) == 2
    said = run.out.with_name("run-said.err").read_text()
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(part in said for part in says), said
    assert tree(run.out) == before


def test_a_run_without_a_whole_point_is_refused_and_not_started_over(killed, start):
    run, *points = killed
    for path in points:
        path.write_bytes(flip(path.read_bytes(), 1000))
    refused(replace(run, resume=True), start, "none of the points", "is whole")


def test_a_plain_rerun_of_an_unfinished_run_is_refused(killed, start):
    refused(killed[0], start, "an unfinished run", "--resume goes on with it", "--overwrite")


@pytest.mark.parametrize("change, says", {
    "architecture": (lambda run: replace(run, model=replace(MODEL, d_ff=64, n_layers=3)),
                     ("model.d_ff was 48, is 64; ", "model.n_layers was 2, is 3")),
    "seed": (lambda run: replace(run, seed=5), ("seed was 0, is 5",)),
    "schedule": (lambda run: replace(run, training=replace(run.training, steps_phase4=9)),
                 ("training.steps_phase4 was 6, is 9",)),
    "corpus": (lambda run: replace(run, data=replace(run.data, num_stories=150)),
               ("corpus (fingerprint) was ",)),
}.values(), ids=["architecture", "seed", "schedule", "corpus"])  # fmt: skip
def test_another_run_is_refused_with_the_list_of_differences(change, says, killed, start):
    refused(replace(change(killed[0]), resume=True), start, "holds another run", *says)


def test_a_torn_last_line_is_no_part_of_the_history(killed, start, whole):
    with (killed[0].out / HISTORY).open("a") as file:
        file.write('{"event": "step", "wall')
    finish(start, killed[0], whole)


def test_another_number_of_threads_goes_on_and_says_that_it_is_not_the_same(killed, start):
    run, end = replace(killed[0], resume=True), ("after train.run_phase 1", signal.SIGKILL)
    assert left(start(run, end, threads=2)) == -signal.SIGKILL
    said = run.out.with_name("run-said.out").read_text()
    assert "kept on cpu with 1 threads" in said and "not bit for bit" in said
    last = [event for event in read(run.out / HISTORY) if event["event"] == "checkpoint"][-1]
    assert last["phase"] == 2 and last["trained"]


def test_resuming_a_finished_run_only_removes_what_is_left_of_it(run, small, start, whole, killed):
    shutil.copytree(small.out, run.out, dirs_exist_ok=True)
    before = {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run.out.iterdir()
        if path.is_file()
    }
    assert left(start(replace(run, resume=True))) == 0
    assert {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.out.iterdir()
    } == before


def test_a_file_where_the_points_belong_is_named(run, start):
    run.out.mkdir()
    (run.out / FOLDER).write_text("no folder")
    refused(run, start, f"out = {run.out} cannot be written")


@pytest.mark.parametrize("lr, log_every", [(1e30, 9), (1e30, 2), (1e39, 9)])
def test_a_loss_that_is_not_finite_leaves_no_point_that_is(lr, log_every, run, capsys):
    training = replace(run.training, checkpoint_every="1", log_every=log_every, lr_phase2=lr)
    code, said = code_of(lambda: main(replace(run, training=training)), capsys)
    kept = sorted(run.out.glob(f"{FOLDER}/*.pt"))
    assert code == 1 and re.search(
        r"^stopped: phase 2( \(moe\))?, step \d+: [\w.]+ is (nan|inf|not finite)", said
    )
    assert f"{kept[-1]} is kept: the same command with --resume" in said
    for path in kept:
        content = load_tensors(path)
        adam = [moment for moments in content["adam"].values() for moment in moments.values()]
        for tensor in [content["reading"]["sums"], *content["weights"].values(), *adam]:
            assert torch.isfinite(tensor).all(), path
