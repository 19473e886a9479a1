"""Bad input is one line that names it, with exit code 2, and nothing else changes."""

from dataclasses import replace

import pytest
import torch

from config import InputError, Phase, Widen
from tests.helpers.damage import capture_command, snapshot_folder
from tests.helpers.small_runs import FOUR_PHASES, MODEL, TRAINING
from train import main
from utils.checkpoint.run_dir import check_disk
from utils.runtime.cli import parse_run
from utils.schedule.memory import check_memory
from utils.schedule.phases import resolve_phases

SMALL = (
    "tiny --model.vocab-size 300 --model.d-model 32 --model.n-layers 2 --model.seq-len 32 "
    "--data.num-stories 200 --data.tokenizer learned --training.batch-size 4 --device cpu"
)
COMMANDS = {
    "--device cuda:99": "device = cuda:99 is not there",
    "--device gpu": "device = gpu is not there",
    "--out FILE": "FILE is a file",
    "--out FILE/run/deeper": "FILE is a file",
    "--data.source nowhere": "data.source = nowhere: no such file or folder",
    "--data.source EMPTY.txt": "there is no text in it",
    "--data.source FOLDER": "the folder holds no .txt",
    "--data.source SHORT.txt": "shorter than one context (model.seq_len = 32 + 1)",
    "--model.seq-len 1000000": "the training text has",
    "--model.seq-len 10000": "the validation text has",
    "--data.source LATIN.txt": "LATIN.txt is not UTF-8: line 1, byte offset ",
    "--data.source CUT.txt.gz": "CUT.txt.gz is damaged",
    "--data.source FILE": "data.source = FILE is not a .txt",
    "--data.tokenizer ./FOLDER": "no such folder with a tokenizer.json",
    "--data.tokenizer ./BROKEN": "tokenizer.json is damaged",
    "--model.vocab-size 256": "has 257 tokens, more than model.vocab_size = 256 has room for",
    "--data.cache FILE/x": "data.cache = FILE/x: cannot be written",
    "--data.num-stories -1": "data.num_stories = -1 must be a whole number, at least 0",
    "--data.valid-fraction 1": "data.valid_fraction = 1.0 must be a finite number, above 0 and",
    "--model.n-heads 3": "model.n_heads = 3 does not divide model.d_model = 32",
    "--model.n-kv-heads 4": "model.n_kv_heads = 4 does not divide model.n_heads = 2",
    "--model.n-heads 32": "rotary positions need an even head size",
    "--model.num-experts 2 --model.top-k 3": "model.top_k = 3 must be between 1 and ",
    "--model.n-layers 0": "model.n_layers = 0 must be a whole number, at least 1",
    "--model.num-experts 4": "phase 2 (moe): ",
    "--training.upcycle.top-k 5": "upcycle.top_k = 5 must be between 1 and upcycle.num_experts = 4",
    "--training.deepen.extra-layers -1": "deepen.extra_layers = -1 must be a whole number",
    "--training.widen.noise nan": "widen.noise = nan must be a finite number, at least 0",
    "--training.steps-phase2 -1": "training.steps_phase2 = -1 must be a whole number",
    "--training.micro-batch-size 3": "phase 1 (dense): training.micro_batch_size = 3 does not",
    "--training.checkpoint-every 5m": "training.checkpoint_every = '5m' is neither",
    "--training.checkpoint-every 0": "training.checkpoint_every = '0' is neither",
    "--training.log-every 0": "training.log_every = 0 must be a whole number, at least 1",
    "--training.lr-phase3 inf": "training.lr_phase3 = inf must be a finite number",
    "--training.beta2 1": "training.beta2 = 1.0 must be a finite number, at least 0 and below 1",
    "--training.low-memory": "training.low_memory = True needs ",
    "--training.cuda-graph on": "training.cuda_graph = on needs ",
    "--training.cuda-graph on --training.no-fused-kernels --precision fp32": (
        "precision = bf16 and training.fused_kernels"
    ),
    "--seed -1": "seed = -1 must be a whole number, at least 0",
    "--resume --overwrite": "resume goes on with what overwrite would remove",
    "--resume": "nothing to resume in out: there is no such folder; --out FOLDER says where",
    "--resume --dry-run": "nothing to resume in out: there is no such folder",
    "--resume --out FOLDER": "nothing to resume in FOLDER: it holds no run",
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
        {
            "a": Phase(FOUR_PHASES.upcycle),
            "b": Phase(Widen()),
            "c": Phase(FOUR_PHASES.upcycle),
        },
        "phase 3 (c): the model already has 4 experts",
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files of every kind that no run can use, with the names that COMMANDS have for them."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("FOLDER", "BROKEN"):
        (folder / name).mkdir()
    (folder / "FILE").write_text("no folder")
    (folder / "BROKEN" / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    for name, content in {
        "EMPTY.txt": b"",
        "SHORT.txt": b"Once.<|endoftext|>Twice.",
        "LATIN.txt": b"caf\xe9 " * 100,
        "CUT.txt.gz": b"\x1f\x8b\x08\x00nothing",
    }.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("flags, phrase", COMMANDS.items(), ids=COMMANDS)
def test_a_command_that_cannot_be_run_is_one_line_and_leaves_all_as_it_was(
    flags, phrase, inputs, base_run, capsys, monkeypatch
):
    monkeypatch.chdir(inputs)
    args = f"{SMALL} --data.cache {base_run.data.cache} --out out {flags}".split()
    before = snapshot_folder(inputs)
    code, output, error = capture_command(lambda: main(parse_run(args)), capsys)
    assert code == 2 and error.startswith("error: ") and phrase in error and not output
    assert snapshot_folder(inputs) == before


@pytest.mark.parametrize("phases, phrase", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_does_not_fit_names_the_phase(phases, phrase, base_run, tmp_path, capsys):
    run = replace(base_run, phases=phases, training=TRAINING, out=tmp_path / "run")
    code, _, error = capture_command(lambda: main(run), capsys)
    assert code == 2 and phrase in error and not run.out.exists()


CHECKS = {
    "disk": (lambda phase, run: check_disk(run.out, [phase]), "the checkpoints need"),
    "memory": (
        lambda phase, run: check_memory([phase], run, torch.device("cpu")),
        "phase 1 (huge) needs",
    ),
}


@pytest.mark.parametrize("check, phrase", CHECKS.values(), ids=CHECKS)
def test_a_phase_that_cannot_fit_is_refused_before_it_begins(check, phrase, base_run):
    phase, *_ = resolve_phases(base_run)
    huge = replace(phase, name="huge", config=replace(MODEL, d_model=1 << 20))
    with pytest.raises(InputError, match=r" \d+\.\d GB") as raised:
        check(huge, base_run)
    assert phrase in str(raised.value)
