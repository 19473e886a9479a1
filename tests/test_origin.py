"""A run that starts from a pretrained model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from llamas import LLAMA3, SMOLLM2, assert_same, make, some_tokens, their_logits
from safetensors.torch import load_file, save_file

from config import DataConfig, Deepen, InputError, Phase, TrainingConfig, Upcycle, Widen, tiny
from train import main
from utils import hf
from utils.checkpoint import load
from utils.cli import parse
from utils.history import read, select
from utils.origin import Origin

BRIEF = TrainingConfig(log_every=2, eval_every=3, eval_tokens=400, sample_tokens=4)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return make(tmp_path_factory.mktemp("origin") / "theirs", LLAMA3, torch.bfloat16)


@pytest.fixture
def run(theirs, tmp_path):
    data = DataConfig("builtin", num_stories=200, cache=tmp_path / "cache")
    phases = {
        "first": Phase(steps=0, batch_size=2),
        "moe": Phase(Upcycle(4), steps=2, batch_size=2),
        "wide": Phase(Widen(2), steps=2, batch_size=2),
        "deep": Phase(Deepen(1), steps=2, batch_size=2),
    }
    model = replace(tiny().model, seq_len=32)
    run = replace(tiny(), model=model, training=BRIEF, data=data, phases=phases, device="cpu")
    return replace(run, init_from=str(theirs), out=tmp_path / "run")


def test_a_run_begins_as_the_pretrained_model_and_every_phase_of_it_can_leave(
    run, theirs, tmp_path, capsys
):
    main(run)
    assert f"start   {theirs}, with its own tokenizer" in capsys.readouterr().out
    begun = load(run.out / "first_final.pt")
    with torch.no_grad():
        logits = begun.state.model()(some_tokens(32)).logits
    assert_same(logits, their_logits(theirs, 32))
    assert logits.dtype == torch.float32, "which training needs"
    wanted = json.loads((theirs / "tokenizer.json").read_text())["model"]["vocab"]
    assert json.loads(begun.tokenizer)["model"]["vocab"] == wanted
    events = read(run.out / "training_history.jsonl")
    assert events[0]["init_fingerprint"] == Origin.of(run).fingerprint
    assert events[0]["config"]["model"]["n_layers"] == LLAMA3["num_hidden_layers"]
    assert [event["kept"] for event in select(events, "grow")] == [True] * 3
    last = load(run.out / "deep_final.pt").config
    assert (last.d_model, last.n_layers, last.num_experts, last.head_dim) == (128, 4, 4, 24)
    assert last.seq_len == 32 and last.rope_scaling.rope_type == "llama3"
    hf.export(run.out / "deep_final.pt", tmp_path / "out")


def test_a_resumption_knows_the_model_wherever_it_lies_and_no_other(run, theirs, tmp_path):
    phases = {"only": Phase(steps=4, batch_size=2)}
    done = replace(run, phases=phases, out=tmp_path / "done")
    main(done)
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "theirs"
    shutil.copytree(theirs, moved)

    stopped = replace(done, out=tmp_path / "stopped", training=replace(BRIEF, checkpoint_every="2"))
    interrupt(stopped)
    again = replace(stopped, init_from=str(moved), resume=True)
    file = moved / "model.safetensors"
    weights, was = load_file(file), file.read_bytes()
    save_file(weights | {"model.norm.weight": 2 * weights["model.norm.weight"]}, file)
    with pytest.raises(InputError, match=r"another run: init_from \(fingerprint\) was \w+, is \w+"):
        main(again)
    file.write_bytes(was)
    main(again)
    ends = [load(out / "only_final.pt").weights for out in (done.out, stopped.out)]
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


def interrupt(run):
    """Ends the run as it is about to keep its last point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.lab.save", stop)
        with pytest.raises(KeyboardInterrupt):
            main(run)


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "words, says",
    [
        (
            "--model.d-ff 48 --model.norm-eps 0.1",
            "model.d_ff = 48, model.norm_eps = 0.1 cannot be set",
        ),
        ("--data.tokenizer gpt2", "data.tokenizer = gpt2: the model that init_from names has its"),
    ],
)
def test_what_the_model_brings_is_not_set_as_well(theirs, words, says):
    with pytest.raises(InputError, match=says):
        parse(["tiny", "--init-from", str(theirs), *words.split()])
    assert parse(["tiny", "--init-from", str(theirs), "--model.seq-len", "64"]).model.seq_len == 64


def test_a_model_that_is_not_there_or_whose_context_is_too_short_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"init_from = /none: there is no such model"):
        Origin.of(replace(run, init_from="/none"))
    there = make(tmp_path / "a", SMOLLM2)
    with pytest.raises(InputError, match=r"model.seq_len = 65: the context of .* is 64 tokens"):
        Origin.of(replace(run, init_from=str(there), model=replace(run.model, seq_len=65)))
