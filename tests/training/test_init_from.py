"""A run that starts from a pretrained model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from config import DataConfig, Deepen, InputError, Phase, TrainingConfig, Upcycle, Widen, tiny
from tests.helpers.hf_models import (
    LLAMA3,
    SMOLLM2,
    assert_same_logits,
    hf_logits,
    random_tokens,
    save_hf_model,
)
from tests.helpers.small_models import is_identical
from train import main
from utils.checkpoint.model import load_checkpoint
from utils.hf.__main__ import run_grow
from utils.hf.convert import export_checkpoint
from utils.metrics.history import HISTORY_FILE, read_history, select_events
from utils.runtime.cli import parse_run
from utils.training.context import check_run, prepare_run
from utils.training.init_from import InitSource

BRIEF = TrainingConfig(log_every=2, eval_every=3, eval_tokens=400, sample_tokens=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_hf_model(tmp_path_factory.mktemp("init_from") / "llama", LLAMA3, torch.bfloat16)


@pytest.fixture
def run(llama, tmp_path):
    data = DataConfig("builtin", num_stories=200, cache=tmp_path / "cache")
    phases = {
        "first": Phase(steps=0, batch_size=2),
        "moe": Phase(Upcycle(4), steps=2, batch_size=2),
        "wide": Phase(Widen(2), steps=2, batch_size=2),
        "deep": Phase(Deepen(1), steps=2, batch_size=2),
    }
    model = replace(tiny().model, seq_len=32)
    run = replace(tiny(), model=model, training=BRIEF, data=data, phases=phases, device="cpu")
    return replace(run, init_from=str(llama), out=tmp_path / "run")


def test_a_run_begins_as_the_pretrained_model_and_its_last_phase_can_be_exported(
    run, llama, tmp_path, capsys
):
    main(run)
    output = " ".join(capsys.readouterr().out.split())
    assert f"start {llama}, with its own tokenizer" in output
    first = load_checkpoint(run.out / "first_final.pt")
    with torch.no_grad():
        logits = first.state.model()(random_tokens(32)).logits
    assert_same_logits(logits, hf_logits(llama, 32))
    assert logits.dtype == torch.float32  # which training needs; the model came in bfloat16
    vocabulary = json.loads((llama / "tokenizer.json").read_text())["model"]["vocab"]
    assert json.loads(first.tokenizer)["model"]["vocab"] == vocabulary
    events = read_history(run.out / HISTORY_FILE)
    assert events[0]["init_fingerprint"] == InitSource.from_run(run).fingerprint
    assert events[0]["config"]["model"]["n_layers"] == LLAMA3["num_hidden_layers"]
    assert [event["passed"] for event in select_events(events, "grow")] == [True] * 3
    last = load_checkpoint(run.out / "deep_final.pt").config
    assert (last.d_model, last.n_layers, last.num_experts, last.head_dim) == (128, 4, 4, 24)
    assert last.seq_len == 32 and last.rope_scaling.rope_type == "llama3"
    export_checkpoint(run.out / "deep_final.pt", tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 128


def test_a_run_resumes_from_the_same_model_wherever_it_lies_and_from_no_other(run, llama, tmp_path):
    whole = replace(run, phases={"only": Phase(steps=4, batch_size=2)}, out=tmp_path / "whole")
    main(whole)
    moved = tmp_path / "moved" / "llama"
    shutil.copytree(llama, moved)

    training = replace(BRIEF, checkpoint_every="2")
    stopped = replace(whole, out=tmp_path / "stopped", training=training)
    interrupt_before_saving(stopped)
    resumed = replace(stopped, init_from=str(moved), resume=True)
    file = moved / "model.safetensors"
    tensors, content = load_file(file), file.read_bytes()
    save_file(tensors | {"model.norm.weight": 2 * tensors["model.norm.weight"]}, file)
    with pytest.raises(InputError, match=r"another run: init_from \(fingerprint\) was \w+, is \w+"):
        main(resumed)
    file.write_bytes(content)
    main(resumed)
    once, twice = (load_checkpoint(run.out / "only_final.pt") for run in (whole, stopped))
    assert is_identical(once.state, twice.state)


def interrupt_before_saving(run):
    """Interrupts a run when all of its steps are done and no model of it is saved."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("utils.checkpoint.resume.save_checkpoint", interrupt)
        main(run)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--model.d-ff 48 --model.norm-eps 0.1",
            "model.d_ff = 48, model.norm_eps = 0.1 cannot be set",
        ),
        ("--data.tokenizer gpt2", "data.tokenizer = gpt2: the model that init_from names has its"),
    ],
)
def test_what_the_model_brings_cannot_be_set_as_well(llama, flags, message):
    with pytest.raises(InputError, match=message):
        parse_run(["tiny", "--init-from", str(llama), *flags.split()])
    run = parse_run(["tiny", "--init-from", str(llama), "--model.seq-len", "64"])
    assert run.model.seq_len == 64


def test_a_finished_run_is_gone_on_with_in_a_new_folder(run, tmp_path):
    phases = {"moe": Phase(Upcycle(4), steps=2, batch_size=2), "wide": Phase(Widen(2), steps=2)}
    first = replace(run, phases=phases)
    main(first)
    file = run.out / "wide_final.pt"
    phases = {"more": Phase(steps=2, lr=0.0), "deep": Phase(Deepen(1), steps=2)}
    main(replace(run, init_from=str(file), phases=phases, out=tmp_path / "more"))
    files = file, *(tmp_path / "more" / f"{name}_final.pt" for name in phases)
    old, more, new = map(load_checkpoint, files)
    assert is_identical(more.state, old.state)  # at a learning rate of 0
    assert new.growth_history == (Upcycle(4), Widen(2), Deepen(1))
    assert new.tokens == old.tokens + 2 * 2 * 8 * 32
    assert (new.tokenizer, new.special_tokens) == (old.tokenizer, old.special_tokens)
    assert (new.init_from, new.max_seq_len) == ("llama", LLAMA3["max_position_embeddings"])


def test_a_widened_model_is_trained_on_at_the_rates_that_its_growths_ask_for(run, tmp_path):
    phases = {"wide": Phase(Widen(2), steps=0)}
    main(replace(run, phases=phases))
    more = replace(run, init_from=str(run.out / "wide_final.pt"), out=tmp_path / "more")
    more = replace(more, phases={"more": Phase(), "wide": Phase(Widen(3))})
    phases = prepare_run(check_run(more)).phases
    assert [phase.growth_history for phase in phases] == [(Widen(2),), (Widen(2), Widen(3))]


def test_a_mixture_is_refused_by_phases_that_upcycle_and_trained_by_those_that_do_not(
    llama, run, tmp_path
):
    run_grow(str(llama), tmp_path / "mixture", upcycle=4)
    main(replace(run, phases={"moe": Phase(Upcycle(4), steps=0)}))
    for name, source in (("own", run.out / "moe_final.pt"), ("theirs", tmp_path / "mixture")):
        out = ["--out", str(tmp_path / name), "--data.cache", str(run.data.cache)]
        flags = ["--init-from", str(source), "--model.seq-len", "32", "--device", "cpu", *out]
        data = ["--data.source", "builtin", "--data.num-stories", "200"]
        with pytest.raises(InputError, match=r"4 experts .* phase 2 \(moe\) .*train.py grow_moe"):
            check_run(parse_run([*flags, *data]))
        phases = [f"--phases.{phase}.steps=1" for phase in ("moe", "wide", "deep")]
        short = ["--training.eval-tokens", "100", "--training.sample-tokens", "0"]
        main(parse_run(["grow_moe", *flags, *data, *phases, *short]))
        last = load_checkpoint(tmp_path / name / "large_moe_final.pt").config
        assert (last.num_experts, last.d_model, last.n_layers) == (4, 128, 6)


def test_a_run_does_not_write_over_the_checkpoint_that_it_starts_from(run):
    main(replace(run, phases={"only": Phase(steps=0)}))
    again = replace(run, init_from=str(run.out / "only_final.pt"), overwrite=True)
    with pytest.raises(InputError, match=r"only_final.pt lies in out = .*--out FOLDER"):
        check_run(again)


def test_a_model_that_is_not_there_or_whose_context_is_too_short_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"init_from = /none: there is no such model"):
        InitSource.from_run(replace(run, init_from="/none"))
    folder = save_hf_model(tmp_path / "a", SMOLLM2)
    run = replace(run, init_from=str(folder), model=replace(run.model, seq_len=65))
    with pytest.raises(InputError, match=r"model.seq_len = 65: the context of .* is 64 tokens"):
        InitSource.from_run(run)
