"""To and from transformers' format, and growing in it:  python -m utils.hf export|import|grow."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from math import prod
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import Deepen, Growth, InputError, ModelConfig, Upcycle, Where, Widen, require
from transfer import GrowthError, State, plan_for
from transfer import grow as grow_state
from utils import llama, pretrained, tokens
from utils.agreement import PROBE, check, random_probe
from utils.checkpoint import Checkpoint, load, save
from utils.cli import run_command
from utils.cpu import peak_resident_gb, return_freed_memory
from utils.data import windows
from utils.errors import RunStopped
from utils.files import writing
from utils.header import parameters
from utils.pretrained import Pretrained, fetch, find, new_folder, save_json, save_weights

DROPPED = (
    "attention_bias", "dtype", "experts_implementation", "mlp_bias", "pretraining_tp",
    "rope_parameters", "torch_dtype",
)  # fmt: skip
"""Keys of a config.json that a grown model's says otherwise, or not at all."""


def export(checkpoint: Path, folder: Path, /, overwrite: bool = False) -> None:
    """Writes a checkpoint as a folder that transformers loads, and lm-evaluation-harness, without
    any code of this project: a LlamaForCausalLM, or with experts a MixtralForCausalLM.

    Nothing is left of it unless transformers, reading it, computes the same logits.

    Args:
        checkpoint: A .pt file of a run.
        folder: To be written.
        overwrite: Replace a model that is there.
    """
    require(
        find_spec("transformers") is not None,
        "export checks what it writes with transformers, which is not here: "
        "pip install 'transformers>=5'",
    )
    saved = load(checkpoint)
    said = llama.to_json(saved.config, saved.balance_coef)
    size = sum(weight.nbytes for weight in saved.weights.values())
    with new_folder(folder, overwrite, size) as part:
        save_json(part / pretrained.CONFIG, said | of_tokens(saved))
        save_weights(part, llama.to_theirs(saved.config, saved.weights))
        save_tokenizer(part, saved)
        text = card(folder.resolve().name, saved.config, history(saved), saved.growth)
        (part / "README.md").write_text(text, encoding="utf-8")
        drift = check(part, saved)
    name = said["architectures"][0]
    print(f"{folder}: {name}, {describe(saved.config)}, {size / 1e9:.3g} GB")
    print(
        f"transformers agrees on {drift.probe_tokens} tokens: logits within "
        f"{drift.max_logit_diff:.1e}, loss {drift.loss_after:.6f} (here {drift.loss_before:.6f}); "
        "generation is the same with and without its cache"
    )


def of_tokens(saved: Checkpoint) -> dict:
    dtype = dtype_name(next(iter(saved.weights.values())).dtype)
    return {"bos_token_id": None, "eos_token_id": saved.eos, "torch_dtype": dtype}


def save_tokenizer(part: Path, saved: Checkpoint) -> None:
    """And what generation needs to know of it."""
    (part / "tokenizer.json").write_text(saved.tokenizer, encoding="utf-8")
    end = Tokenizer.from_str(saved.tokenizer).id_to_token(saved.eos)
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "model_max_length": saved.config.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    save_json(part / "tokenizer_config.json", said)
    generation = {"eos_token_id": saved.eos, "pad_token_id": saved.eos}
    save_json(part / "generation_config.json", generation)


def history(saved: Checkpoint) -> str:
    """Where it began and how far it was trained, in words."""
    began = f"Began as `{saved.init_from}`" if saved.init_from else "Began with random weights"
    if not saved.tokens:
        return f"{began} and was not trained since."
    phase = f"; the model of phase `{saved.phase_name}`" if saved.phase_name else ""
    return f"{began}, trained on {saved.tokens:,} tokens with seed {saved.seed}{phase}."


def card(name: str, config: ModelConfig, history: str, growth: Sequence[Growth]) -> str:
    """The model card: what it is and how it came to be."""
    each = "".join(f"- {told(how)}\n" for how in growth)
    grown = f"How it grew, in order:\n\n{each}" if growth else "It has not grown.\n"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags:\n- model-growth\n---\n\n# {name}\n\n"
        f"{describe(config)}, context {config.seq_len:,}.\n\n{history} {grown}"
    )


def told(how: Growth) -> str:
    """An operator with its settings, but for the limits that it kept within, and what it did."""
    settings = [f"{name}={value}" for name, value in asdict(how).items() if name[:4] != "max_"]
    did = "the function was kept" if how.exact else "the function changed"
    return f"`{type(how).__name__}({', '.join(settings)})`: {did}"


def describe(config: ModelConfig) -> str:
    kind = f"{config.num_experts} experts, top-{config.top_k}" if config.num_experts else "dense"
    count = parameters(config.num_params, config.num_active_params)
    return f"{config.n_layers} x {config.d_model}, {kind}, {count} parameters"


def import_(model: str, checkpoint: Path, /, overwrite: bool = False) -> None:
    """Makes a checkpoint of this project of a Llama or Mixtral in transformers' format.

    Args:
        model: A folder, or a name on the Hugging Face hub.
        checkpoint: The .pt file to be written.
        overwrite: Replace a file that is there.
    """
    require(overwrite or not checkpoint.exists(), f"{checkpoint} is there: --overwrite replaces it")
    require(checkpoint.parent.is_dir(), f"{checkpoint}: there is no folder {checkpoint.parent}")
    found = find(model)
    tokenizer, eos = tokens.load(model, 0, lambda: iter(()))
    state = found.state()
    told = {"balance_coef": found.balance_coef, "init_from": pretrained.title(model)}
    with writing(checkpoint):
        save(checkpoint, Checkpoint(state.config, state.weights, tokenizer.to_str(), eos, **told))
    print(f"{checkpoint}: {describe(state.config)}, context {state.config.seq_len:,}")


def grow(
    model: str,
    folder: Path,
    /,
    upcycle: int = 0,
    widen: int = 1,
    deepen: int = 0,
    top_k: int = 2,
    noise: float = Widen.noise,
    where: Where = Deepen.where,
    text: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Grows a Llama or Mixtral in transformers' format without training it, and says how far that
    moved it. First it is upcycled, then widened, then deepened, as far as is asked for.

    Weights keep their precision, but for widening, whose noise would not cancel below float32.

    Args:
        model: A folder, or a name on the Hugging Face hub.
        folder: To be written.
        upcycle: Experts that each feed-forward becomes; 0: it stays one.
        widen: Times as wide.
        deepen: More layers.
        top_k: Experts that each token visits.
        noise: On the copies of widening, relative to each weight's standard deviation.
        where: New layers between the old ones, or all after them or in their middle.
        text: Compare on the beginning of this file instead of on random tokens.
        seed: Of routers, noise and random tokens.
        overwrite: Replace a model that is there.
    """
    began = time.perf_counter()
    return_freed_memory()
    hows: list[Growth] = []
    if upcycle:
        hows.append(Upcycle(upcycle, top_k))
    if widen != 1:
        hows.append(Widen(widen, noise))
    if deepen:
        hows.append(Deepen(deepen, where))
    require(bool(hows), "nothing to do: --upcycle, --widen or --deepen says how to grow")
    found = find(model)
    config = found.config
    for how in hows:
        config, _ = plan_for(config, how)
    dtype = found.dtype if widen == 1 else torch.promote_types(found.dtype, torch.float32)

    with new_folder(folder, overwrite, config.num_params * dtype.itemsize) as part:
        probe = random_probe(found.config, seed) if text is None else text_probe(found, text)
        state = found.state(dtype)
        for i, how in enumerate(hows):
            try:
                state, drift = grow_state(state, how, probe, seed + i, consume=True)
            except GrowthError as error:
                raise RunStopped(f"{error}; nothing is written") from error
            print(f"{type(how).__name__} kept the function: {drift}")
        size = save_grown(part, folder.resolve().name, found, state, hows)
    seconds, memory = time.perf_counter() - began, peak_resident_gb()
    peak = "" if memory is None else f", peak memory {memory:.2f} GB"
    print(
        f"{folder}: {describe(config)}, {size / 1e9:.3g} GB of {dtype_name(dtype)} weights, "
        f"in {seconds:.1f} s{peak}"
    )


def text_probe(found: Pretrained, text: Path) -> Tensor:
    """Windows (B, T + 1) of the beginning of a file."""
    length = min(PROBE[1], found.config.seq_len)
    tokenizer, _ = tokens.load(found.name, 0, lambda: iter(()))
    try:
        with text.open(encoding="utf-8") as file:
            start = file.read(16 * prod(PROBE))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text = {text}: cannot be read ({error})") from error
    ids = tokenizer.encode(start, add_special_tokens=False).ids
    require(len(ids) > length, f"text = {text} has {len(ids)} tokens, not the {length + 1} needed")
    return windows(np.array(ids), length, PROBE[0] * (length + 1))


def save_grown(part: Path, name: str, found: Pretrained, state: State, hows: list[Growth]) -> int:
    """The grown model, with all else that its config.json said and its tokenizer as it was.
    Returns the bytes of the weights."""
    kept = {key: value for key, value in found.said.items() if key not in DROPPED}
    dtype = dtype_name(next(iter(state.weights.values())).dtype)
    said = llama.to_json(state.config, found.balance_coef)
    save_json(part / pretrained.CONFIG, kept | said | {"torch_dtype": dtype})
    for beside in pretrained.TOKENIZER:
        if (path := fetch(found.name, beside)) is not None:
            shutil.copyfile(path, part / beside)
    began = f"Began as `{pretrained.title(found.name)}` and was not trained since."
    text = card(name, state.config, began, hows)
    (part / "README.md").write_text(text, encoding="utf-8")
    return save_weights(part, llama.to_theirs(state.config, state.weights))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    import tyro

    commands = {"export": export, "import": import_, "grow": grow}
    run_command(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="python -m utils.hf"))
