"""Growing a folder in transformers' format."""

import re
import subprocess
import sys
from pathlib import Path

import llamas
import pytest
import torch
from llamas import MODELS, SMOLLM2, assert_same, make, their_logits
from transformers import AutoConfig, AutoModelForCausalLM

from config import InputError
from utils import hf, pretrained, stories

ROOT = Path(__file__).parent.parent
theirs = llamas.theirs
every_model = pytest.mark.parametrize("name", MODELS)


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


def test_the_command_says_in_one_line_what_is_wrong(theirs, tmp_path):
    command = [sys.executable, "-m", "utils.hf", "grow", theirs["llama3"], tmp_path / "a"]
    done = subprocess.run([*command, "--widen", "0"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: factor = 0 must be at least 1\n"
