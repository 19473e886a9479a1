"""Grows a model in transformers' format, from one folder into another, without training it."""

import shutil
import time
from pathlib import Path

from config import Growth, InputError, ModelConfig
from transfer import GrowthError, grow, make_plan
from transfer.checks import run_twice
from transfer.plan import grown_dtype
from utils.hf.config_json import to_hf_config
from utils.hf.model_folder import (
    describe_model,
    model_card,
    new_model_folder,
    write_model,
)
from utils.hf.parity import (
    check_grown_folder,
    require_transformers,
    some_stories,
    text_probe,
)
from utils.hf.pretrained import Pretrained, fetch_model_file, find_pretrained, model_title
from utils.runtime.cpu import peak_resident_gb, return_freed_memory
from utils.runtime.device import dtype_name
from utils.runtime.errors import RunStopped
from utils.runtime.formatting import format_duration, format_gb, wrap_lines
from utils.text.tokenizer import read_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files beside the model that stay as they are when it grows."""
KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")
"""Keys of a config.json that the grown model's has as well. All others follow from its shape, or
may be wrong for it, like `layer_types` of fewer layers or `auto_map` to code for another class."""


def grow_folder(
    model: str,
    folder: Path,
    growths: list[Growth],
    text: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Grows a model in transformers' format by `growths`, one after the other, and prints how far
    its function moved. See `python -m utils.hf grow --help` for the other arguments.

    Raises:
        InputError: if the model cannot be represented or grown like that,
            or the folder cannot be written.
        RunStopped: if a growth moved the function further than it may, or transformers cannot load
            what was written or computes something else.
    """
    start = time.perf_counter()
    return_freed_memory()
    require_transformers()
    pretrained = find_pretrained(model)
    config, dtype = pretrained.config, pretrained.dtype
    for growth in growths:
        config, plan = make_plan(config, growth)
        dtype = grown_dtype(plan, dtype)
    card = model_card(folder.resolve().name, config, growths, model_title(model))

    with new_model_folder(folder, overwrite, config.num_params * dtype.itemsize) as part:
        tokenizer, _ = read_tokenizer(pretrained.name)
        content = some_stories() if text is None else read_text(text)
        source = "the built-in text" if text is None else f"text = {text}"
        probe = text_probe(tokenizer, pretrained.config, content, source)
        state = pretrained.load_state()
        for i, growth in enumerate(growths):
            try:
                state, drift = grow(state, growth, probe, seed + i, consume=True)
            except GrowthError as error:
                raise RunStopped(f"{error}; nothing is written") from error
            print(wrap_lines(f"{type(growth).__name__} kept the function: probe {drift}"))
        hf_config, own = grown_hf_config(pretrained, config), run_twice(state.model(), probe)
        weight_bytes = write_model(part, config, state.weights, hf_config, card)
        copy_tokenizer(model, part)
        check_grown_folder(part, config, own, probe)
    seconds, memory = time.perf_counter() - start, peak_resident_gb()
    peak = "" if memory is None else f", peak memory {format_gb(memory)}"
    size = format_gb(weight_bytes / 1e9)
    line = f"{folder}: {describe_model(config)}, {size} of {dtype_name(dtype)} weights"
    print(wrap_lines(f"{line}, in {format_duration(seconds)}{peak}"))


def read_text(path: Path) -> str:
    """Returns the content of a text file. Raises InputError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text = {path}: cannot be read ({error})") from error


def grown_hf_config(pretrained: Pretrained, config: ModelConfig) -> dict:
    """Returns the entries of the grown model's config.json: those of the new architecture, and
    KEPT_KEYS of the old one."""
    kept = {key: value for key, value in pretrained.hf_config.items() if key in KEPT_KEYS}
    return kept | to_hf_config(config, pretrained.load_balance_coef)


def copy_tokenizer(name: str, folder: Path) -> None:
    """Copies those of TOKENIZER_FILES that a model has into `folder`."""
    for file_name in TOKENIZER_FILES:
        if (path := fetch_model_file(name, file_name)) is not None:
            shutil.copyfile(path, folder / file_name)
