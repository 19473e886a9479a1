"""Finds a Llama or Mixtral in transformers' format in a folder or on the hub, checks it, and reads
it."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import InputError, ModelConfig, require
from transfer import TrainState
from utils.hf.config_json import CONFIG_FILE, from_hf_config
from utils.hf.state_dict import from_hf, hf_shapes
from utils.runtime.device import dtype_name
from utils.runtime.hub import (
    OFFLINE_HINT,
    NotOnHub,
    fetch_hub_file,
    fetch_optional_hub_file,
    first_line,
    hash_file,
)
from utils.text.tokenizer import is_local_path

WEIGHTS_FILE = "model.safetensors"
INDEX_FILES = {
    WEIGHTS_FILE: "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}
"""Files of weights, the first of which is read, and the index of each where it is in parts."""
FLOAT_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip
"""The dtypes that weights may have, by their names in safetensors' files."""
BIN_DTYPES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
EMBEDDING_TENSOR, HEAD_TENSOR = "model.embed_tokens.weight", "lm_head.weight"
MODEL_HINT = f"try a folder, {OFFLINE_HINT}"
DERIVED_SUFFIX = "rotary_emb.inv_freq"
"""Ends the name of a tensor in older files that follows from the configuration."""


@dataclass(frozen=True)
class Pretrained:
    """A model whose configuration and tensors' shapes have been checked. Its weights are not read
    before `load_state` is called."""

    name: str
    """A folder, or a name on the hub."""
    hf_config: dict
    """The entries of its config.json."""
    config: ModelConfig
    load_balance_coef: float
    """Weight of the load-balancing loss; the default where a dense model has none."""
    files: dict[str, Path]
    """The file that holds each tensor, by transformers' names."""
    dtype: torch.dtype
    """The dtype of most of its numbers; routers and norms may have another."""

    def load_state(self, dtype: torch.dtype | None = None) -> TrainState:
        """Reads the weights, all in `dtype`, or each in its own for None.

        Raises:
            InputError: naming the tensor, if a weight is not finite, or the head of a model with
                tied embeddings differs from its embedding.
        """
        opened = {path: open_weights(path) for path in set(self.files.values())}

        def read(name: str) -> Tensor:
            tensor = opened[self.files[name]].read(name)
            require(bool(tensor.isfinite().all()), f"{self.name}: {name} is not finite")
            return tensor.to(dtype or tensor.dtype)

        if self.config.tie_embeddings and HEAD_TENSOR in self.files:
            require(
                torch.equal(read(HEAD_TENSOR), read(EMBEDDING_TENSOR)),
                f"{self.name}: tie_word_embeddings = true, but {HEAD_TENSOR} differs",
            )
        return TrainState(self.config, from_hf(self.config, read))

    def fingerprint(self) -> str:
        """Returns a hash of config.json and of all weights."""
        hashes = [hash_file(path) for path in sorted(set(self.files.values()))]
        content = json.dumps([self.hf_config, hashes], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def find_pretrained(name: str) -> Pretrained:
    """Finds a model in a folder or on the hub, and checks everything but its weights' values.

    Raises:
        InputError: naming the file, key or tensor, for what is missing, damaged or cannot be
            represented.
    """
    missing = f"it has no {CONFIG_FILE}"
    if is_local_path(name):
        missing = f"there is no such model, no folder with a {CONFIG_FILE}"
    hf_config = read_model_json(name, CONFIG_FILE, missing)
    try:
        config, load_balance_coef = from_hf_config(hf_config)
    except InputError as error:
        raise InputError(f"{name}: {CONFIG_FILE}: {error}") from None
    files, dtype = find_tensors(name, config)
    return Pretrained(name, hf_config, config, load_balance_coef, files, dtype)


def model_title(name: str) -> str:
    """Returns what a model is called in another place: its name on the hub, or its folder's name
    without the path."""
    return Path(name).expanduser().resolve().name if name and is_local_path(name) else name


def fetch_model_file(name: str, file_name: str) -> Path | None:
    """Returns a file of the model, from its folder or from the hub; None where it has no such
    file."""
    if is_local_path(name):
        path = Path(name).expanduser() / file_name
        return path if path.is_file() else None
    return fetch_optional_hub_file(name, file_name, "model", MODEL_HINT)


def require_model_file(name: str, file_name: str, missing: str) -> Path:
    """Returns a file of the model. Raises InputError, saying `missing`, where it has no such
    file."""
    if (path := fetch_model_file(name, file_name)) is not None:
        return path
    if not is_local_path(name):
        with suppress(NotOnHub):
            return fetch_hub_file(name, file_name, "model", MODEL_HINT)  # says why it did not come
    raise InputError(f"{name}: {missing}")


def read_model_json(name: str, file_name: str, missing: str) -> dict:
    """Returns the content of a JSON file of the model. Raises InputError where it cannot be read,
    or, saying `missing`, where there is no such file."""
    path = require_model_file(name, file_name, missing)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{name}: {file_name} cannot be read ({error})") from error


def find_tensors(name: str, config: ModelConfig) -> tuple[dict[str, Path], torch.dtype]:
    """Returns the file that holds each tensor, and the dtype of most of the numbers in them.

    Raises:
        InputError: naming the tensor, unless the files hold exactly those of `config`.
    """
    wanted = hf_shapes(config)
    allowed = wanted | ({HEAD_TENSOR: wanted[EMBEDDING_TENSOR]} if config.tie_embeddings else {})
    files: dict[str, Path] = {}
    sizes: Counter[torch.dtype] = Counter()
    for path in find_weight_files(name):
        for tensor, (shape, kind) in open_weights(path).headers.items():
            if tensor.endswith(DERIVED_SUFFIX):
                continue
            require(tensor in allowed, f"{name}: {tensor} cannot be represented")
            require(
                shape == allowed[tensor],
                f"{name}: {tensor} is {shape}, not {allowed[tensor]}",
            )
            require(
                kind in FLOAT_DTYPES,
                f"{name}: {tensor} is of type {kind}, not a plain float",
            )
            files[tensor] = path
            sizes[FLOAT_DTYPES[kind]] += prod(shape)
    for tensor in wanted:
        require(tensor in files, f"{name}: {tensor} is missing")
    return files, sizes.most_common(1)[0][0]


def find_weight_files(name: str) -> list[Path]:
    """Returns the model's files of weights.

    Raises:
        InputError: naming the file, if one is missing or the index of several cannot be read.
    """
    for whole, index in INDEX_FILES.items():
        if (path := fetch_model_file(name, whole)) is not None:
            return [path]
        if fetch_model_file(name, index) is not None:
            shards = read_model_json(name, index, "").get("weight_map")
            if not isinstance(shards, dict):
                raise InputError(f"{name}: {index} has no weight_map")
            names = sorted(set(map(str, shards.values())))
            return [require_model_file(name, shard, f"{shard} is missing") for shard in names]
    raise InputError(f"{name}: there is no {' or '.join(INDEX_FILES)}")


class WeightFile(NamedTuple):
    """An open file of weights, whose tensors are not read yet."""

    headers: dict[str, tuple[tuple[int, ...], str]]
    """Shape and dtype of each tensor, by transformers' names; dtypes as safetensors calls them."""
    read: Callable[[str], Tensor]
    """Returns a tensor by its name."""


def open_weights(path: Path) -> WeightFile:
    """Opens a file of weights. Raises InputError where it is damaged or none."""
    if path.suffix == ".bin":
        return open_bin_weights(path)
    try:
        file = safe_open(path, "pt", backend="pread")  # mapped, what was read would stay in memory
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error})") from error
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
    headers = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    return WeightFile(headers, file.get_tensor)


def open_bin_weights(path: Path) -> WeightFile:
    """Opens a file of weights that `torch.save` wrote; nothing in it is executed. Raises InputError
    where it is damaged or none."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        headers = {
            name: (tuple(tensor.shape), BIN_DTYPES.get(tensor.dtype, dtype_name(tensor.dtype)))
            for name, tensor in tensors.items()
        }
    except Exception as error:  # what another program wrote fails in any way
        raise InputError(
            f"{path} is damaged or no file of weights ({first_line(error)}); transformers may "
            "convert it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)"
        ) from error
    return WeightFile(headers, tensors.__getitem__)
