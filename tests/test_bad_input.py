"""Bad input: one line that names it, an exit code, and nothing else changes."""

from dataclasses import replace

import pytest
import test_crash
import torch
from damage import code_of, tree
from test_crash import FOUR, MODEL

from config import InputError, Phase, Widen
from train import main
from utils.cli import parse
from utils.output import check_disk
from utils.schedule import Stage, check_memory

small, run = test_crash.small, test_crash.run
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
    "--training.lean": "training.lean = True needs ",
    "--training.capture on": "training.capture = on needs ",
    "--training.capture on --training.no-fused --precision fp32": "precision = bf16 and training.f",
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
