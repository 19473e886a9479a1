"""Out to transformers, and what is said and left where that fails."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import llamas
import pytest
import torch
from llamas import assert_same
from small import trained_like
from transformers import AutoConfig

from config import Deepen, InputError, ModelConfig, RopeScaling, Upcycle, Widen
from transfer import State, carry_out, plan_for
from utils import agreement, hf, llama, pretrained, stories, tokens
from utils.checkpoint import Checkpoint, load, save
from utils.errors import RunStopped
from utils.files import sweep_parts

ROOT = Path(__file__).parent.parent
theirs = llamas.theirs
CONFIG = ModelConfig(
    300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, d_ff=50, seq_len=48
)
GROWTH = (Upcycle(4), Widen(2), Deepen(1))
SCALED = replace(CONFIG, tied=False, rope_theta=500.0, rope_scaling=RopeScaling("linear", 2.0))
SLMS = {
    "dense": (CONFIG, ()),
    "experts": (CONFIG, GROWTH[:1]),
    "wide": (CONFIG, GROWTH[:2]),
    "deep": (CONFIG, GROWTH),
    "untied": (SCALED, ()),
}
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
said = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(open(sys.argv[1]).read())["input_ids"]])[:, :480].view(10, 48)
    out = model(ids, labels=ids)
    text = tokenizer.decode(model.generate(ids[:1, :9], do_sample=False, max_new_tokens=12)[0])
    said[folder] = {
        "class": type(model).__name__, "dtype": str(model.dtype), "ids": ids.tolist(),
        "perplexity": out.loss.exp().item(), "logits": out.logits[:2].tolist(), "text": text,
    }
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.learn(stories.stories(60), CONFIG.vocab_size)


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """A file of a model that went through growths."""

    def checkpoint(config=CONFIG, growth=(), name="model.pt", **changes):
        state = State.of(trained_like(config).float())
        for how in growth:
            state = carry_out(*plan_for(state.config, how), state)
        told = {"tokenizer": tokenizer.to_str(), "eos": 0, "growth": growth} | changes
        save(tmp_path / name, Checkpoint(state.config, state.weights, **told))
        return tmp_path / name

    return checkpoint


def read_afresh(text, folders):
    """What transformers makes of them in a process of its own, without this project or a hub."""
    command = [sys.executable, "-c", READ, text, *folders]
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | alone, cwd=text.parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_transformers_alone_computes_what_the_exported_models_do(checkpoint, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(stories.stories(20)))
    files = {tmp_path / name: checkpoint(*told, name=f"{name}.pt") for name, told in SLMS.items()}
    for folder, file in files.items():
        hf.export(file, folder)
    said = read_afresh(text, files)
    ids = tokenizer.encode(text.read_text()).ids
    for folder, file in files.items():
        model, got = load(file).state.model(), said[str(folder)]
        kind = "Mixtral" if model.config.num_experts else "Llama"
        assert got["class"] == f"{kind}ForCausalLM" and got["dtype"] == "torch.float32"
        seen = torch.tensor(got["ids"])
        assert seen.flatten().tolist() == ids[:480]
        with torch.no_grad():
            logits = model(seen).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), seen[:, 1:].flatten()
        )
        assert got["perplexity"] == pytest.approx(loss.exp().item(), rel=5e-5), "four digits"
        assert_same(torch.tensor(got["logits"]), logits[:2])
        assert got["text"] == tokenizer.decode(greedy(model, got["ids"][0][:9], 12))


def greedy(model, text, length):
    for _ in range(length):
        text = [*text, int(model(torch.tensor([text])).logits[0, -1].argmax())]
    return text


def test_an_export_says_all_that_the_model_is(checkpoint, tmp_path):
    config = replace(
        CONFIG, rope_theta=777.0, rope_scaling=RopeScaling("llama3", 4.0), norm_eps=1e-3
    )
    trained = {"balance_coef": 0.025, "phase_name": "moe", "tokens": 12_345}
    hf.export(checkpoint(config, (Upcycle(5, 3),), **trained), tmp_path / "out")
    said = AutoConfig.from_pretrained(tmp_path / "out")
    assert (said.num_local_experts, said.num_experts_per_tok) == (5, 3)
    assert said.router_aux_loss_coef == 0.025
    assert (said.head_dim, said.num_key_value_heads, said.rms_norm_eps) == (10, 2, 1e-3)
    assert said.tie_word_embeddings and said.max_position_embeddings == 48
    assert said.eos_token_id == 0
    assert said.rope_parameters == {"rope_theta": 777.0, **asdict(config.rope_scaling)}
    assert pretrained.find(str(tmp_path / "out")).balance_coef == 0.025


def test_the_card_tells_where_a_model_began_and_which_growths_kept_its_function(
    checkpoint, theirs, tmp_path
):
    def card(file, out):
        hf.export(file, tmp_path / out)
        return (tmp_path / out / "README.md").read_text()

    growth = (Upcycle(4, 3, redrawn=0.5), Widen(2), Deepen(1), Deepen(2, init="copy"))
    trained = {"phase_name": "deep", "tokens": 12_345, "seed": 7}
    grown = card(checkpoint(CONFIG, growth, **trained), "grown")
    assert (
        "random weights, trained on 12,345 tokens with seed 7; the model of phase `deep`" in grown
    )
    told = [line for line in grown.splitlines() if "the function" in line]
    assert [line.endswith("was kept") for line in told] == [False, True, True, False]
    assert told[0].startswith("- `Upcycle(num_experts=4, top_k=3") and "max_" not in grown

    hf.import_(str(theirs["llama3"]), tmp_path / "a.pt")
    back = card(tmp_path / "a.pt", "back")
    assert back.endswith("Began as `llama3` and was not trained since. It has not grown.\n")
    hf.grow(str(theirs["llama3"]), tmp_path / "big", deepen=1)
    big = (tmp_path / "big" / "README.md").read_text()
    assert "Began as `llama3` and was not trained since." in big and "was kept" in big


def test_what_transformers_computes_otherwise_is_not_exported(checkpoint, tmp_path, monkeypatch):
    file, out = checkpoint(), tmp_path / "out"
    hf.export(file, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    wrong = llama.to_json(CONFIG, 0.01) | {"rope_theta": 9_000.0}
    monkeypatch.setattr(llama, "to_json", lambda *_: wrong)
    with pytest.raises(RunStopped, match=r"logits are off by .* nothing is exported"):
        hf.export(file, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out"]


def test_a_cache_that_changes_the_text_is_noticed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "continuation", lambda *settings: [settings[-1]])
    with pytest.raises(RunStopped, match="otherwise with its cache"):
        hf.export(checkpoint(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_transformers_an_export_says_how_to_get_it(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'transformers>=5'"):
        hf.export(checkpoint(), tmp_path / "out")


def test_learned_positions_are_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"model.position = learned: no Llama"):
        hf.export(checkpoint(replace(CONFIG, position="learned")), tmp_path / "out")


KILLED = """
import os, signal, sys
from pathlib import Path
from utils.files import whole_folder
with whole_folder(Path(sys.argv[1])) as part:
    (part / "config.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_export_leaves_no_model_and_the_next_one_clears_up(checkpoint, tmp_path):
    file = checkpoint()
    for name in ("out", "out.2"):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], cwd=ROOT, timeout=60)
    assert not (tmp_path / "out").exists()
    left = {path for path in tmp_path.iterdir() if path != file}
    assert len(left) == 2 and all(path.name.endswith(".part") for path in left)
    sweep_parts(tmp_path)  # of a run in the same folder, whose parts are files
    hf.export(file, tmp_path / "out")
    (of_another,) = (path for path in left if path.exists())
    assert of_another.name.startswith(".out.2.")


def test_an_export_through_a_link_replaces_what_it_points_at(checkpoint, tmp_path):
    file = checkpoint()
    hf.export(file, tmp_path / "disk" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    (tmp_path / "disk" / "out" / "old.txt").touch()
    for _ in range(2):
        hf.export(file, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "link" / "old.txt").exists()
    assert (tmp_path / "link" / "README.md").read_text().count("# out\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "model.pt"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_all_files_of_an_export_are_for_the_same_readers(checkpoint, tmp_path):
    hf.export(checkpoint(), tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
