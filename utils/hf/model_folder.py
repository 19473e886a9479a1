"""Writes a folder that transformers loads: the configuration, the weights and a model card."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from config import Growth, ModelConfig, require
from utils.hf.config_json import CONFIG_FILE
from utils.hf.state_dict import to_hf
from utils.runtime.atomic_io import atomic_folder, explain_write_errors
from utils.runtime.device import dtype_name
from utils.runtime.formatting import (
    format_architecture,
    format_gb,
    format_name,
    format_params,
)


@contextmanager
def new_model_folder(folder: Path, overwrite: bool, weight_bytes: int) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder` once it is complete.

    Raises:
        InputError: if `folder` is there, unless it is a model's and to be overwritten; if its path
            is not UTF-8; if the disk has no room for `weight_bytes`; if
            the system refuses to write.
    """
    path = str(folder.resolve())
    require(
        format_name(path) == path,
        f"{folder}: safetensors and transformers need a path in UTF-8 (is PYTHONUTF8=1 set?)",
    )
    if folder.exists():
        require(overwrite, f"{folder} is there already: --overwrite replaces it")
        require(
            folder.is_dir() and ((folder / CONFIG_FILE).is_file() or not any(folder.iterdir())),
            f"{folder} is no model's folder (it has no {CONFIG_FILE}): it is left as it is",
        )
    with explain_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.resolve().parent).free
        require(
            free > weight_bytes,
            f"{folder}: {format_gb(weight_bytes / 1e9)} to write, {format_gb(free / 1e9)} free",
        )
        with atomic_folder(folder) as part:
            yield part


def write_model(
    folder: Path, config: ModelConfig, weights: dict[str, Tensor], hf_config: dict, card: ModelCard
) -> int:
    """Writes all of a model but its tokenizer.

    Args:
        folder: An empty folder.
        config: The model.
        weights: Its parameters by name. The dictionary is emptied, as `to_hf` does.
        hf_config: The entries of config.json, but for the weights' dtype.
        card: The model card.

    Returns:
        The bytes of the files of weights.
    """
    dtype = dtype_name(main_dtype(weights))
    write_json(folder / CONFIG_FILE, hf_config | {"torch_dtype": dtype})
    card.save(folder / "README.md")
    return write_weights(folder, to_hf(config, weights))


def main_dtype(weights: dict[str, Tensor]) -> torch.dtype:
    """Returns the dtype of most of the numbers in some weights."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights.values():
        sizes[weight.dtype] += weight.numel()
    return sizes.most_common(1)[0][0]


def write_weights(
    folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str = "5GB"
) -> int:
    """Writes tensors into one file, or into several with an index if they are larger than
    `max_shard_size`, and returns the bytes of these files."""
    try:
        save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    files = list(folder.glob("*.safetensors"))
    for path in files:  # the library writes files that nobody but their owner may read
        path.chmod(folder.stat().st_mode & 0o666)
    return sum(path.stat().st_size for path in files)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_card(
    name: str,
    config: ModelConfig,
    growth_history: Sequence[Growth],
    init_from: str,
    tokens: int = 0,
    seed: int = 0,
    phase_name: str = "",
) -> ModelCard:
    """Returns a card that says what a model is and how it came to be.

    Args:
        name: What the model is called.
        config: The model.
        growth_history: The operators that it has been through, in order.
        init_from: What it began as; empty for random weights.
        tokens: Training tokens that it has seen.
        seed: Seed of its training.
        phase_name: The phase at whose end it was saved.
    """
    start = f"Began as `{init_from}`" if init_from else "Began with random weights"
    phase = f"; the model of phase `{phase_name}`" if phase_name else ""
    trained = f", trained on {tokens:,} tokens with seed {seed}{phase}"
    training = start + (trained if tokens else " and was not trained since")
    growths = "\n".join(f"- {describe_growth(growth)}" for growth in growth_history)
    grown = f"How it grew, in order:\n\n{growths}" if growths else "It has not grown."
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["model-growth"]
    )
    text = (
        f"---\n{data}\n---\n\n# {name}\n\n{describe_model(config)}, context {config.seq_len:,}.\n\n"
        f"{training}. {grown}\n"
    )
    return ModelCard(format_name(text))


def describe_growth(growth: Growth) -> str:
    """Returns an operator with its settings, without its tolerance, and whether the function was
    kept."""
    names = [field.name for field in fields(growth) if field.name != "tolerance"]
    settings = ", ".join(f"{name}={getattr(growth, name)}" for name in names)
    effect = "the function was kept" if growth.is_exact else "the function changed"
    return f"`{type(growth).__name__}({settings})`: {effect}"


def describe_model(config: ModelConfig) -> str:
    """Returns a model's shape and number of parameters, in words."""
    count = format_params(config.num_params, config.num_active_params)
    return f"{format_architecture(config)}, {count} parameters"
