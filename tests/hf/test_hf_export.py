"""Export to transformers' format, and what stays in place where it fails."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from config import Deepen, InputError, ModelConfig, RopeScaling, Upcycle, Widen
from tests.helpers.hf_models import (
    SMOLLM2,
    assert_same_logits,
    hf_logits,
    make_instruct,
    save_hf_model,
)
from tests.helpers.small_models import random_model, windows
from transfer import TrainState, apply_plan, make_plan
from utils.checkpoint.model import Checkpoint, load_checkpoint, save_checkpoint
from utils.hf import convert, parity
from utils.hf.__main__ import run_grow
from utils.hf.config_json import to_hf_config
from utils.hf.convert import export_checkpoint, import_model
from utils.hf.parity import check_generation
from utils.hf.pretrained import find_pretrained
from utils.runtime.atomic_io import remove_partial_files
from utils.runtime.errors import RunStopped
from utils.text.builtin.stories import builtin_stories
from utils.text.special_tokens import SpecialTokens
from utils.text.tokenizer import learn_tokenizer

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(
    300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, d_ff=50, seq_len=48
)
GROWTHS = (Upcycle(4), Widen(2), Deepen(1))
UNTIED = replace(
    CONFIG, tie_embeddings=False, rope_theta=500.0, rope_scaling=RopeScaling("linear", 2.0)
)
MODELS = {
    "dense": (CONFIG, ()),
    "experts": (CONFIG, GROWTHS[:1]),
    "wide": (CONFIG, GROWTHS[:2]),
    "deep": (CONFIG, GROWTHS),
    "untied": (UNTIED, ()),
}
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
answers = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(open(sys.argv[1]).read())["input_ids"]])[:, :480].view(10, 48)
    out = model(ids, labels=ids)
    text = tokenizer.decode(model.generate(ids[:1, :9], do_sample=False, max_new_tokens=12)[0])
    answers[folder] = {
        "class": type(model).__name__, "dtype": str(model.dtype), "ids": ids.tolist(),
        "perplexity": out.loss.exp().item(), "logits": out.logits[:2].tolist(), "text": text,
    }
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer(builtin_stories(60), CONFIG.vocab_size)


@pytest.fixture
def make_checkpoint(tokenizer, tmp_path):
    """Returns a function that writes the file of a model that went through growths."""

    def make_checkpoint(config=CONFIG, growths=(), name="model.pt", **settings):
        state = TrainState.from_model(random_model(config).float())
        for growth in growths:
            state = apply_plan(*make_plan(state.config, growth), state)
        checkpoint = Checkpoint(
            state.config, state.weights, tokenizer.to_str(), SpecialTokens((0,)), growths
        )
        save_checkpoint(tmp_path / name, replace(checkpoint, **settings))
        return tmp_path / name

    return make_checkpoint


def file_contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_alone(text, folders):
    """Returns what transformers makes of the folders in a process without this project or a hub."""
    command = [sys.executable, "-c", READ, text, *folders]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env=os.environ | settings,
        cwd=text.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def continue_greedily(model, ids, length):
    for _ in range(length):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


@torch.no_grad()
def test_transformers_alone_computes_what_the_exported_models_do(
    make_checkpoint, tokenizer, story_file, tmp_path
):
    files = {
        tmp_path / name: make_checkpoint(*model, name=f"{name}.pt")
        for name, model in MODELS.items()
    }
    for folder, file in files.items():
        export_checkpoint(file, folder)
    answers = read_alone(story_file, files)
    ids = torch.tensor(tokenizer.encode(story_file.read_text()).ids[:480]).view(10, 48)
    for folder, file in files.items():
        model, answer = load_checkpoint(file).state.model(), answers[str(folder)]
        family = "Mixtral" if model.config.num_experts else "Llama"
        assert answer["class"] == f"{family}ForCausalLM" and answer["dtype"] == "torch.float32"
        assert answer["ids"] == ids.tolist()
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert answer["perplexity"] == pytest.approx(loss.exp().item(), rel=5e-5)
        assert_same_logits(torch.tensor(answer["logits"]), logits[:2])
        assert answer["text"] == tokenizer.decode(continue_greedily(model, ids[0, :9].tolist(), 12))


def test_an_export_keeps_the_end_of_text_and_the_load_balancing_loss(make_checkpoint, tmp_path):
    export_checkpoint(
        make_checkpoint(CONFIG, (Upcycle(5, 3),), load_balance_coef=0.025), tmp_path / "out"
    )
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 0
    assert find_pretrained(str(tmp_path / "out")).load_balance_coef == 0.025


def test_in_and_out_again_texts_begin_end_and_are_talked_in_as_before(tmp_path):
    source, out = make_instruct(save_hf_model(tmp_path / "source", SMOLLM2)), tmp_path / "out"
    import_model(str(source), tmp_path / "a.pt")
    export_checkpoint(tmp_path / "a.pt", out)
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert new("One day")["input_ids"] == old("One day")["input_ids"]
    assert new("One day")["input_ids"][0] == new.bos_token_id == old.bos_token_id == 200
    assert new.eos_token == old.eos_token == "<|im_end|>"
    talk = [{"role": "user", "content": "One day"}]
    expected = old.apply_chat_template(talk, tokenize=False)
    assert new.apply_chat_template(talk, tokenize=False) == expected == "One day<|im_end|>"
    for folder in (source, out):
        settings = GenerationConfig.from_pretrained(folder)
        assert (settings.bos_token_id, settings.eos_token_id) == (200, [201, 0])
    # What lm-evaluation-harness scores with: the first token, the longest context, the logits.
    old, new = (AutoConfig.from_pretrained(folder) for folder in (source, out))
    assert new.max_position_embeddings == old.max_position_embeddings
    assert torch.equal(hf_logits(out), hf_logits(source))


def test_an_export_keeps_the_longer_context_of_the_model_that_it_began_as(
    make_checkpoint, tmp_path
):
    export_checkpoint(make_checkpoint(max_seq_len=512), tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 512
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 512


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_export_has_the_dtype_that_is_asked_for(make_checkpoint, tmp_path, dtype):
    checkpoint = make_checkpoint(CONFIG, GROWTHS[:1])
    export_checkpoint(checkpoint, tmp_path / "out", dtype=dtype)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    expected = load_checkpoint(checkpoint).weights["norm.weight"].to(getattr(torch, dtype))
    assert torch.equal(weights["model.norm.weight"], expected)


def test_a_folder_that_transformers_refuses_is_not_written(make_checkpoint, tmp_path, monkeypatch):
    refused = to_hf_config(CONFIG, 0.01) | {"model_type": "none"}
    monkeypatch.setattr(convert, "to_hf_config", lambda *_: refused)
    with pytest.raises(RunStopped, match=r"transformers cannot load it .* nothing is written"):
        export_checkpoint(make_checkpoint(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_says_how_a_model_began_and_which_growths_kept_its_function(
    make_checkpoint, hf_folders, tmp_path
):
    def export_card(file, name):
        export_checkpoint(file, tmp_path / name)
        return (tmp_path / name / "README.md").read_text()

    growths = (Upcycle(4, 3, reinit_fraction=0.5), Widen(2), Deepen(1), Deepen(2, init="copy"))
    checkpoint = make_checkpoint(CONFIG, growths, phase_name="deep", tokens=12_345, seed=7)
    grown = export_card(checkpoint, "grown")
    assert grown.startswith("---\nlibrary_name: transformers\n")
    assert (
        "random weights, trained on 12,345 tokens with seed 7; the model of phase `deep`" in grown
    )
    lines = [line for line in grown.splitlines() if "the function" in line]
    assert [line.endswith("was kept") for line in lines] == [False, True, True, False]
    assert lines[0].startswith("- `Upcycle(num_experts=4, top_k=3") and "olerance" not in grown

    import_model(str(hf_folders["llama3"]), tmp_path / "a.pt")
    back = export_card(tmp_path / "a.pt", "back")
    assert back.endswith("Began as `llama3` and was not trained since. It has not grown.\n")
    run_grow(str(hf_folders["llama3"]), tmp_path / "big", deepen=1)
    big = (tmp_path / "big" / "README.md").read_text()
    assert "Began as `llama3` and was not trained since." in big and "was kept" in big


def test_a_model_that_transformers_computes_otherwise_is_not_exported(
    make_checkpoint, tmp_path, monkeypatch
):
    file, out = make_checkpoint(), tmp_path / "out"
    export_checkpoint(file, out)
    before = file_contents(out)
    wrong = to_hf_config(CONFIG, 0.01) | {"rope_theta": 9_000.0}
    monkeypatch.setattr(convert, "to_hf_config", lambda *_: wrong)
    with pytest.raises(RunStopped, match=r"logits are off by .* nothing is written"):
        export_checkpoint(file, out, overwrite=True)
    assert file_contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out"]


def test_a_cache_that_changes_the_text_is_noticed():
    def generate(start, use_cache, **_):
        return start + int(use_cache)

    with pytest.raises(RunStopped, match="otherwise with its cache"):
        check_generation(SimpleNamespace(generate=generate), windows(CONFIG), CONFIG.seq_len)


def test_without_transformers_an_export_says_how_to_get_it(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'transformers>=5'"):
        export_checkpoint(make_checkpoint(), tmp_path / "out")


KILLED = """
import os, signal, sys
from pathlib import Path
from utils.hf.model_folder import new_model_folder
with new_model_folder(Path(sys.argv[1]), overwrite=False, weight_bytes=0) as part:
    (part / "config.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_export_leaves_no_model_and_the_next_one_clears_up(make_checkpoint, tmp_path):
    file = make_checkpoint()
    for name in ("out", "out.2"):
        command = [sys.executable, "-c", KILLED, tmp_path / name]
        assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    leftovers = {path for path in tmp_path.iterdir() if path != file}
    assert len(leftovers) == 2 and all(path.name.endswith(".part") for path in leftovers)
    remove_partial_files(tmp_path)  # a run in the same folder does this; its own parts are files
    export_checkpoint(file, tmp_path / "out")
    (other,) = (path for path in leftovers if path.exists())
    assert other.name.startswith(".out.2.")


def test_an_export_through_a_link_replaces_what_it_points_at(make_checkpoint, tmp_path):
    file = make_checkpoint()
    export_checkpoint(file, tmp_path / "disk" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    (tmp_path / "disk" / "out" / "old.txt").touch()
    for _ in range(2):
        export_checkpoint(file, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "link" / "old.txt").exists()
    assert (tmp_path / "link" / "README.md").read_text().count("# out\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "model.pt"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_all_files_of_an_export_may_be_read_by_whom_the_umask_lets(
    make_checkpoint, tmp_path, umask
):
    file = make_checkpoint()
    before = os.umask(umask)
    try:
        export_checkpoint(file, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_the_weights_of_an_export_are_marked_as_torch_s(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
