"""Grows a model in transformers' format, from one folder into another, without training it."""

import shutil
import time
from pathlib import Path

from config import Deepen, Growth, InputError, ModelConfig, Placement, Upcycle, Widen, require
from transfer import GrowthError, grow, make_plan
from transfer.plan import grown_dtype
from utils.hf.config_json import to_hf_config
from utils.hf.model_folder import (
    describe_model,
    model_card,
    new_model_folder,
    write_model,
)
from utils.hf.parity import PROBE_TOKENS, PROBE_WINDOWS, some_stories, text_probe
from utils.hf.pretrained import Pretrained, fetch_model_file, find_pretrained, model_title
from utils.runtime.cpu import peak_resident_gb, return_freed_memory
from utils.runtime.device import dtype_name
from utils.runtime.errors import RunStopped
from utils.text.tokenizer import read_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files beside the model that stay as they are when it grows."""
DROPPED_KEYS = {
    "attention_bias", "dtype", "experts_implementation", "mlp_bias", "pretraining_tp",
    "rope_parameters", "torch_dtype",
}  # fmt: skip
"""Keys of a config.json that the grown model's has otherwise, or not at all."""
MAX_CHARS_PER_TOKEN = 16
"""Characters to read for each token that the probe needs."""


def grow_folder(
    model: str,
    folder: Path,
    /,
    upcycle: int = 0,
    widen: int = 1,
    deepen: int = 0,
    top_k: int = Upcycle.top_k,
    noise: float = Widen.noise,
    placement: Placement = Deepen.placement,
    text: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Grow a Llama or Mixtral in transformers' format without training it, and print how far its
    function moved. It is first upcycled, then widened, then deepened, each only if asked for.

    The weights stay in their dtype, but widening makes them at least float32: below that its noise
    would not cancel.

    Args:
        model: A folder, or a name on the Hugging Face hub.
        folder: The folder to write.
        upcycle: Number of experts that each feed-forward becomes. 0 leaves it dense.
        widen: How many times as wide the model becomes.
        deepen: Number of new layers.
        top_k: Experts that each token visits.
        noise: Standard deviation of the noise on widening's copies, relative to each weight's own.
        placement: Put the new layers between the old ones, after the last, or in the middle.
        text: Compare the models on the beginning of this file instead of on the built-in stories.
        seed: Seed of routers, noise and new layers.
        overwrite: Replace a model that is there.

    Raises:
        InputError: if there is nothing to do, the model cannot be represented or grown like that,
            or the folder cannot be written.
        RunStopped: if a growth moved the function further than it may.
    """
    start = time.perf_counter()
    return_freed_memory()
    growths: list[Growth] = [Upcycle(upcycle, top_k)] if upcycle else []
    growths += [Widen(widen, noise)] if widen != 1 else []
    growths += [Deepen(deepen, placement)] if deepen else []
    require(bool(growths), "nothing to do: --upcycle, --widen or --deepen says how to grow")
    pretrained = find_pretrained(model)
    config, dtype = pretrained.config, pretrained.dtype
    for growth in growths:
        config, plan = make_plan(config, growth)
        dtype = grown_dtype(plan, dtype)
    card = model_card(folder.resolve().name, config, growths, model_title(model))

    with new_model_folder(folder, overwrite, config.num_params * dtype.itemsize) as part:
        tokenizer, _ = read_tokenizer(pretrained.name)
        beginning = some_stories() if text is None else read_beginning(text)
        source = "the built-in text" if text is None else f"text = {text}"
        probe = text_probe(tokenizer, pretrained.config, beginning, source)
        state = pretrained.load_state(dtype)
        for i, growth in enumerate(growths):
            try:
                state, drift = grow(state, growth, probe, seed + i, consume=True)
            except GrowthError as error:
                raise RunStopped(f"{error}; nothing is written") from error
            print(f"{type(growth).__name__} kept the function: {drift}")
        hf_config = grown_hf_config(pretrained, config)
        weight_bytes = write_model(part, config, state.weights, hf_config, card)
        copy_tokenizer(model, part)
    seconds, memory = time.perf_counter() - start, peak_resident_gb()
    peak = "" if memory is None else f", peak memory {memory:.2f} GB"
    print(
        f"{folder}: {describe_model(config)}, {weight_bytes / 1e9:.3g} GB of {dtype_name(dtype)} "
        f"weights, in {seconds:.1f} s{peak}"
    )


def read_beginning(path: Path) -> str:
    """Returns the beginning of a text file, as much as the probe needs. Raises InputError where it
    cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CHARS_PER_TOKEN * PROBE_WINDOWS * PROBE_TOKENS)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text = {path}: cannot be read ({error})") from error


def grown_hf_config(pretrained: Pretrained, config: ModelConfig) -> dict:
    """Returns the entries of the grown model's config.json: those of the old one, with the new
    architecture's in their place."""
    kept = {key: value for key, value in pretrained.hf_config.items() if key not in DROPPED_KEYS}
    return kept | to_hf_config(config, pretrained.load_balance_coef)


def copy_tokenizer(name: str, folder: Path) -> None:
    """Copies those of TOKENIZER_FILES that a model has into `folder`."""
    for file_name in TOKENIZER_FILES:
        if (path := fetch_model_file(name, file_name)) is not None:
            shutil.copyfile(path, folder / file_name)
