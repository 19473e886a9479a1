"""Growing a folder in transformers' format."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from config import InputError, ModelConfig
from tests.helpers.hf_models import (
    HF_MODELS,
    SMOLLM2,
    assert_same_logits,
    hf_logits,
    save_hf_model,
)
from utils.hf.__main__ import run_grow
from utils.hf.config_json import to_hf_config
from utils.hf.convert import export_checkpoint, import_model
from utils.hf.parity import PROBE_WINDOWS, text_probe
from utils.hf.pretrained import find_pretrained
from utils.runtime.errors import RunStopped
from utils.text.tokenizer import learn_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", HF_MODELS)
@pytest.mark.parametrize(
    "growths",
    [
        {"upcycle": 4, "top_k": 3},
        {"widen": 2},
        {"widen": 3, "noise": 1.0},
        {"deepen": 2},
        {"upcycle": 4, "widen": 2, "deepen": 3, "placement": "end"},
    ],
    ids=lambda growths: "-".join(growths),
)
def test_a_folder_grows_and_transformers_computes_what_it_did(hf_folders, name, growths, tmp_path):
    small, big = hf_folders[name], tmp_path / "big"
    run_grow(str(small), big, **growths)
    assert_same_logits(hf_logits(big), hf_logits(small))
    after, before = AutoConfig.from_pretrained(big), AutoConfig.from_pretrained(small)
    assert after.model_type == ("mixtral" if "upcycle" in growths else "llama")
    assert after.head_dim == before.head_dim
    assert after.rope_parameters == before.rope_parameters
    assert after.hidden_size == growths.get("widen", 1) * before.hidden_size
    assert after.num_hidden_layers == growths.get("deepen", 0) + before.num_hidden_layers
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (big / file).read_bytes() == (small / file).read_bytes()


def test_a_grown_mixture_grows_on(hf_folders, tmp_path):
    run_grow(str(hf_folders["smollm2"]), tmp_path / "a", upcycle=4)
    run_grow(str(tmp_path / "a"), tmp_path / "b", widen=2, deepen=1)
    assert_same_logits(hf_logits(tmp_path / "b"), hf_logits(hf_folders["smollm2"]))
    with pytest.raises(InputError, match="already has 4 experts"):
        run_grow(str(tmp_path / "a"), tmp_path / "c", upcycle=4)


@pytest.mark.parametrize(
    "growths, dtype", [({"upcycle": 4, "deepen": 1}, torch.bfloat16), ({"widen": 2}, torch.float32)]
)
def test_growing_keeps_the_dtype_but_for_widening(growths, dtype, tmp_path, capsys):
    small = save_hf_model(tmp_path / "small", SMOLLM2, torch.bfloat16)
    run_grow(str(small), tmp_path / "big", **growths)
    name = str(dtype).removeprefix("torch.")
    assert f"B of {name} weights" in " ".join(capsys.readouterr().out.split())
    assert_same_logits(hf_logits(tmp_path / "big"), hf_logits(small))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "big").dtype == dtype


def test_one_router_in_float32_leaves_the_rest_in_bfloat16(tmp_path):
    small = save_hf_model(tmp_path / "small", SMOLLM2, torch.bfloat16)
    run_grow(str(small), tmp_path / "moe", upcycle=4)
    file = tmp_path / "moe" / "model.safetensors"
    router = "model.layers.1.block_sparse_moe.gate.weight"
    tensors = load_file(file)
    tensors[router] = tensors[router].float() * 1.001
    save_file(tensors, file, {"format": "pt"})
    run_grow(str(tmp_path / "moe"), tmp_path / "deep", deepen=1, placement="end")
    import_model(str(tmp_path / "moe"), tmp_path / "a.pt")
    export_checkpoint(tmp_path / "a.pt", tmp_path / "back")
    for name in ("deep", "back"):
        written = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(written[router], tensors[router])
        others = {weight.dtype for tensor, weight in written.items() if tensor != router}
        assert others == {torch.bfloat16}
        assert AutoConfig.from_pretrained(tmp_path / name).dtype == torch.bfloat16


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def test_what_a_config_says_of_layers_and_code_does_not_outlive_a_growth(tmp_path):
    small = save_hf_model(tmp_path / "small", SMOLLM2)
    layers = SMOLLM2["num_hidden_layers"]
    code = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_config(small, layer_types=["full_attention"] * layers, auto_map=code)
    run_grow(str(small), tmp_path / "big", deepen=2)
    assert_same_logits(hf_logits(tmp_path / "big"), hf_logits(small))
    big = json.loads((tmp_path / "big" / "config.json").read_text())
    assert "auto_map" not in big and (big["eos_token_id"], big["initializer_range"]) == (0, 0.1)


def test_a_grown_folder_that_transformers_computes_otherwise_is_not_written(
    hf_folders, tmp_path, monkeypatch
):
    def wrong(config, coef):
        return to_hf_config(config, coef) | {"rope_theta": 9_000.0}

    monkeypatch.setattr("utils.hf.grow_folder.to_hf_config", wrong)
    with pytest.raises(RunStopped, match=r"transformers' logits are off by .* nothing is written"):
        run_grow(str(hf_folders["smollm2"]), tmp_path / "big", deepen=1)
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize(
    "option, growths, operator",
    [
        ({"top_k": 2}, {"widen": 2}, "upcycle"),
        ({"noise": 0.1}, {"deepen": 1}, "widen"),
        ({"placement": "end"}, {"upcycle": 4}, "deepen"),
    ],
)
def test_an_option_without_effect_is_refused(hf_folders, tmp_path, option, growths, operator):
    ((name, value),) = option.items()
    with pytest.raises(InputError, match=f"{name} = {value} has no effect without --{operator}"):
        run_grow(str(hf_folders["smollm2"]), tmp_path / "out", **growths, **option)


def test_growth_prints_what_it_moved_took_and_wrote(hf_folders, story_file, tmp_path, capsys):
    source = str(hf_folders["llama3"])
    run_grow(source, tmp_path / "a", upcycle=4, deepen=1, text=story_file)
    output = " ".join(capsys.readouterr().out.split())
    assert output.startswith("Upcycle kept the function: probe loss") and " Deepen kept" in output
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    summary = rf"a: 4 x 64, 4 experts, top-2, .* parameters, {size / 1e6:.1f} MB of float32 weights"
    assert re.search(rf"{summary}, in [\d.]+ s", output)


def test_a_text_to_compare_on_that_cannot_be_read_or_is_too_short_is_named(hf_folders, tmp_path):
    source, out = str(hf_folders["llama3"]), tmp_path / "out"
    with pytest.raises(InputError, match=r"text = .*none.txt: cannot be read"):
        run_grow(source, out, deepen=1, text=tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("One day")
    with pytest.raises(InputError, match=r"short.txt has \d+ tokens, not the 65 needed"):
        run_grow(source, out, deepen=1, text=tmp_path / "short.txt")
    assert not out.exists()


def test_a_text_with_a_token_that_the_model_has_no_row_for_is_one_line(
    hf_folders, story_file, tmp_path
):
    small = Path(shutil.copytree(hf_folders["llama3"], tmp_path / "small"))
    tokenizer = Tokenizer.from_file(str(small / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(small / "tokenizer.json"))
    run_grow(str(small), tmp_path / "a", deepen=1, text=story_file)
    story_file.write_text(story_file.read_text().replace(".", "[PAD]"))
    with pytest.raises(
        InputError, match=r"text = .*: token 300 \('\[PAD\]'\) is none of the model"
    ):
        run_grow(str(small), tmp_path / "b", deepen=1, text=story_file)


def test_a_folder_whose_path_is_not_utf_8_is_refused_before_any_work(hf_folders, tmp_path):
    with pytest.raises(InputError, match=r"need a path in UTF-8"):
        run_grow(str(hf_folders["llama3"]), tmp_path / "caf\udce9", deepen=1)


def test_a_folder_is_replaced_only_if_asked_to_and_only_if_it_is_a_model_s(hf_folders, tmp_path):
    source, out = str(hf_folders["smollm2"]), tmp_path / "out"
    run_grow(source, out, deepen=1)
    with pytest.raises(InputError, match="out is there already: --overwrite replaces it"):
        run_grow(source, out, deepen=2)
    run_grow(source, out, deepen=2, overwrite=True)
    assert find_pretrained(str(out)).config.n_layers == SMOLLM2["num_hidden_layers"] + 2
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(InputError, match="thesis is no model's folder"):
        run_grow(source, tmp_path / "thesis", deepen=1, overwrite=True)
    with pytest.raises(InputError, match="nothing to do: --upcycle, --widen or --deepen"):
        run_grow(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]


def test_the_command_says_in_one_line_what_is_wrong(hf_folders, tmp_path):
    command = [sys.executable, "-m", "utils.hf", "grow", hf_folders["llama3"], tmp_path / "a"]
    done = subprocess.run([*command, "--widen", "0"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: widen.factor = 0 must be a whole number, at least 1\n"


@pytest.mark.parametrize("repeats", [1, 100])
def test_the_probe_is_spread_over_the_text(repeats):
    letters = "abcdefgh"[:PROBE_WINDOWS]
    text = "".join(letter * 200 * repeats for letter in letters)
    tokenizer, config = learn_tokenizer(iter(letters), 257), ModelConfig(seq_len=32)
    probe = text_probe(tokenizer, config, text, "text")
    assert probe.shape == (PROBE_WINDOWS, 33)
    assert len(probe.unique()) == PROBE_WINDOWS, "a window a letter"
