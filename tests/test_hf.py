"""Out to transformers and in from it, and growing in its format."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from hub import serving
from llamas import MODELS, SMOLLM2, assert_same, make, some_tokens, their_logits
from safetensors.torch import load_file, save_file
from small import trained_like
from transformers import AutoConfig, AutoModelForCausalLM

from config import Deepen, InputError, ModelConfig, RopeScaling, Upcycle, Widen
from transfer import State, carry_out, plan_for
from utils import agreement, hf, llama, pretrained, stories, tokens
from utils.checkpoint import Checkpoint, load, save
from utils.errors import RunStopped
from utils.files import sweep_parts

ROOT = Path(__file__).parent.parent
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
def theirs(tmp_path_factory):
    """The folder of each of MODELS."""
    folder = tmp_path_factory.mktemp("llamas")
    return {name: make(folder / name, config) for name, config in MODELS.items()}


every_model = pytest.mark.parametrize("name", MODELS)


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


@every_model
def test_an_imported_model_computes_what_it_did(theirs, name, tmp_path):
    hf.import_(str(theirs[name]), tmp_path / "a.pt")
    saved = load(tmp_path / "a.pt")
    with torch.no_grad():
        assert_same(saved.state.model()(some_tokens()).logits, their_logits(theirs[name]))
    assert saved.eos == 0 and saved.config.seq_len == MODELS[name]["max_position_embeddings"]
    with pytest.raises(InputError, match=r"a.pt is there: --overwrite"):
        hf.import_(str(theirs[name]), tmp_path / "a.pt")


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_in_and_out_again_every_weight_is_what_it_was_bit_for_bit(name, dtype, tmp_path):
    there = make(tmp_path / "there", MODELS[name], dtype)
    hf.import_(str(there), tmp_path / "a.pt")
    hf.export(tmp_path / "a.pt", tmp_path / "back")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (there, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    for tensor, weight in before.items():
        assert weight.dtype == after[tensor].dtype == dtype and torch.equal(weight, after[tensor])
    one, other = (AutoConfig.from_pretrained(f).to_dict() for f in (there, tmp_path / "back"))
    free = {"_name_or_path", "bos_token_id", "initializer_range"}
    assert {k: one[k] for k in one.keys() - free} == {k: other[k] for k in one.keys() - free}


@every_model
@pytest.mark.parametrize(
    "growth",
    [
        {"upcycle": 4, "top_k": 3},
        {"widen": 2},
        {"widen": 3, "noise": 1.0},
        {"deepen": 2},
        {"upcycle": 4, "widen": 2, "deepen": 3, "where": "end"},
    ],
    ids=lambda growth: "-".join(growth),
)
def test_a_folder_grows_and_transformers_computes_what_it_did(theirs, name, growth, tmp_path):
    hf.grow(str(theirs[name]), tmp_path / "big", **growth)
    assert_same(their_logits(tmp_path / "big"), their_logits(theirs[name]))
    config, was = (AutoConfig.from_pretrained(f) for f in (tmp_path / "big", theirs[name]))
    assert config.model_type == ("mixtral" if "upcycle" in growth else "llama")
    assert config.head_dim == was.head_dim and config.rope_parameters == was.rope_parameters
    assert config.hidden_size == growth.get("widen", 1) * was.hidden_size
    assert config.num_hidden_layers == growth.get("deepen", 0) + was.num_hidden_layers
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "big" / file).read_bytes() == (theirs[name] / file).read_bytes()


def test_a_grown_mixture_grows_on(theirs, tmp_path):
    hf.grow(str(theirs["smollm2"]), tmp_path / "a", upcycle=4)
    hf.grow(str(tmp_path / "a"), tmp_path / "b", widen=2, deepen=1)
    assert_same(their_logits(tmp_path / "b"), their_logits(theirs["smollm2"]))
    with pytest.raises(InputError, match="already has 4 experts"):
        hf.grow(str(tmp_path / "a"), tmp_path / "c", upcycle=4)


def test_growing_keeps_the_precision_but_for_widening(tmp_path, capsys):
    there = make(tmp_path / "there", SMOLLM2, torch.bfloat16)
    for growth, dtype in ({"upcycle": 4, "deepen": 1}, "bfloat16"), ({"widen": 2}, "float32"):
        hf.grow(str(there), tmp_path / dtype, **growth)
        assert f"GB of {dtype} weights" in capsys.readouterr().out
        assert_same(their_logits(tmp_path / dtype), their_logits(there))
        assert AutoModelForCausalLM.from_pretrained(tmp_path / dtype).dtype == getattr(torch, dtype)


def test_growth_tells_what_it_moved_took_and_wrote(theirs, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(stories.stories(20)))
    hf.grow(str(theirs["llama3"]), tmp_path / "a", upcycle=4, deepen=1, text=text)
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("Upcycle kept the function: loss") and second.startswith("Deepen kept")
    told = r"a: 4 x 64, 4 experts, top-2, .* parameters, 0.00\d+ GB of float32 weights, in .* s"
    assert re.search(told, last)
    with pytest.raises(InputError, match=r"text = .*none.txt: cannot be read"):
        hf.grow(str(theirs["llama3"]), tmp_path / "b", deepen=1, text=tmp_path / "none.txt")


def test_weights_in_several_files_are_the_same_weights(theirs, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(theirs["llama3"], folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    size = pretrained.save_weights(folder, whole, limit=100_000)
    files = sorted(folder.glob("model-*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    assert size == sum(file.stat().st_size for file in files)
    assert all(
        torch.equal(reduce(dict.__or__, map(load_file, files))[n], w) for n, w in whole.items()
    )
    assert torch.equal(their_logits(folder), their_logits(theirs["llama3"]))
    found = [pretrained.find(str(f)).state().weights for f in (folder, theirs["llama3"])]
    assert all(torch.equal(found[0][name], weight) for name, weight in found[1].items())
    files[1].unlink()
    with pytest.raises(InputError, match=f"{files[1].name} is missing"):
        pretrained.find(str(folder))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "qwen2"}, "model_type = qwen2: only llama and mixtral"),
        ({"attention_bias": True}, "attention_bias = True cannot be represented"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = dynamic"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"hidden_size": "64"}, "hidden_size = 64 must be a whole number"),
        ({"num_attention_heads": 0}, "model.n_heads = 0"),
        ({"num_key_value_heads": 3}, "model.n_kv_heads = 3 does not divide"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, r"model.layers.2.\S+ cannot be represented"),
        ({"intermediate_size": 97}, r"is \(64, 96\), not \(64, 97\)"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_represented_is_refused_by_name(theirs, tmp_path, change, says):
    shutil.copytree(theirs["llama3"], tmp_path / "a")
    said = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(InputError, match=says) as raised:
        hf.import_(str(tmp_path / "a"), tmp_path / "a.pt")
    assert str(tmp_path / "a") in str(raised.value) and "\n" not in str(raised.value)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "q_proj.bias cannot be repr"),
        ({NORM: torch.ones(63)}, rf"{NORM} is \(63,\), not \(64,\)"),
        ({NORM: torch.full((64,), torch.nan)}, f"{NORM} is not finite"),
        ({NORM: torch.ones(64, dtype=torch.int8)}, f"{NORM} is of type I8, not a plain float"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(theirs, tmp_path, change, says):
    shutil.copytree(theirs["llama3"], tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file) | change, file)
    with pytest.raises(InputError, match=says):
        hf.import_(str(tmp_path / "a"), tmp_path / "a.pt")


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("config.json", None, "no folder with a config.json"),
        ("config.json", b"{", "config.json cannot be read"),
        ("model.safetensors", None, "there is no model.safetensors"),
        ("model.safetensors", b"pickle", "is damaged or no safetensors file"),
        ("tokenizer.json", None, "no such folder with a tokenizer.json|cannot be read|damaged"),
    ],
)
def test_a_missing_or_damaged_file_is_named(theirs, tmp_path, file, content, says):
    shutil.copytree(theirs["llama3"], tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    if content is not None:
        (tmp_path / "a" / file).write_bytes(content)
    with pytest.raises(InputError, match=says):
        hf.import_(str(tmp_path / "a"), tmp_path / "a.pt")


def test_a_folder_is_replaced_only_if_told_to_and_only_if_it_is_a_model_s(theirs, tmp_path):
    source, out = str(theirs["smollm2"]), tmp_path / "out"
    hf.grow(source, out, deepen=1)
    with pytest.raises(InputError, match="out is there already: --overwrite replaces it"):
        hf.grow(source, out, deepen=2)
    hf.grow(source, out, deepen=2, overwrite=True)
    assert pretrained.find(str(out)).config.n_layers == SMOLLM2["num_hidden_layers"] + 2
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(InputError, match="thesis is no model's folder"):
        hf.grow(source, tmp_path / "thesis", deepen=1, overwrite=True)
    with pytest.raises(InputError, match="nothing to do: --upcycle, --widen or --deepen"):
        hf.grow(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]


def test_a_checkpoint_that_cannot_be_written_is_named(theirs, tmp_path):
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\)"):
        hf.import_(str(theirs["llama3"]), tmp_path, overwrite=True)


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


IMPORT = """
import sys
from pathlib import Path
from utils.cli import run_command
from utils.hf import import_
run_command(lambda: [import_(name, Path(name[4:] + sys.argv[1])) for name in sys.argv[2:]])
"""


def test_a_model_comes_from_the_hub_once_and_then_from_its_cache(theirs, tmp_path):
    files = {f"org/mini/{path.name}": path.read_bytes() for path in theirs["llama3"].iterdir()}
    settings = {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}

    def imported(endpoint, offline, *words):
        return subprocess.run(
            [sys.executable, "-c", IMPORT, *words],
            env=os.environ | settings | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    with serving(files) as hub:
        cold = imported(hub.endpoint, "0", "-cold.pt", "org/mini")
    warm = imported(hub.endpoint, "1", "-warm.pt", "org/mini", "org/maxi")
    assert (cold.returncode, warm.returncode) == (0, 2), cold.stderr + warm.stderr
    one, other = (load(tmp_path / f"mini-{name}.pt").weights for name in ("cold", "warm"))
    assert all(torch.equal(one[name], weight) for name, weight in other.items())
    assert warm.stderr.startswith("error: model: config.json of org/maxi cannot be fetched")
    assert warm.stderr.count("\n") == 1 and "HF_HUB_OFFLINE" in warm.stderr


def test_the_command_says_in_one_line_what_is_wrong(theirs, tmp_path):
    command = [sys.executable, "-m", "utils.hf", "grow", theirs["llama3"], tmp_path / "a"]
    done = subprocess.run([*command, "--widen", "0"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: factor = 0 must be at least 1\n"
