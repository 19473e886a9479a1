"""Finds a Llama or Mixtral in transformers' format in a folder or on the hub, checks it, and reads
it."""

import hashlib
import json
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import InputError, ModelConfig, require
from transfer import TrainState
from utils.hf.config_json import CONFIG_FILE, from_hf_config
from utils.hf.state_dict import from_hf, hf_shapes
from utils.runtime.hub import OFFLINE_HINT, NotOnHub, fetch_hub_file, hash_file
from utils.text.tokenizer import is_local_path

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FLOAT_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip
"""The dtypes that weights may have, by their names in safetensors' files."""
EMBEDDING_TENSOR, HEAD_TENSOR = "model.embed_tokens.weight", "lm_head.weight"
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
    """The smallest dtype that holds every tensor exactly."""

    def load_state(self, dtype: torch.dtype | None = None) -> TrainState:
        """Reads the weights, all in `dtype`, or in the model's own for None.

        Raises:
            InputError: naming the tensor, if a weight is not finite, or the head of a model with
                tied embeddings differs from its embedding.
        """
        opened = {path: open_weights(path) for path in set(self.files.values())}

        def read(name: str) -> Tensor:
            tensor = opened[self.files[name]].get_tensor(name)
            require(bool(tensor.isfinite().all()), f"{self.name}: {name} is not finite")
            return tensor.to(dtype or self.dtype)

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
    missing = f"there is no such model, no folder with a {CONFIG_FILE} and none on the hub"
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
    try:
        return fetch_hub_file(name, file_name, "model", f"try a folder, {OFFLINE_HINT}")
    except NotOnHub:
        return None


def require_model_file(name: str, file_name: str, missing: str) -> Path:
    """Returns a file of the model. Raises InputError, saying `missing`, where it has no such
    file."""
    path = fetch_model_file(name, file_name)
    if path is None:
        raise InputError(f"{name}: {missing}")
    return path


def read_model_json(name: str, file_name: str, missing: str) -> dict:
    """Returns the content of a JSON file of the model. Raises InputError where it cannot be read,
    or, saying `missing`, where there is no such file."""
    path = require_model_file(name, file_name, missing)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{name}: {file_name} cannot be read ({error})") from error


def find_tensors(name: str, config: ModelConfig) -> tuple[dict[str, Path], torch.dtype]:
    """Returns the file that holds each tensor, and the smallest dtype that holds all of them.

    Raises:
        InputError: naming the tensor, unless the files hold exactly those of `config`.
    """
    wanted = hf_shapes(config)
    allowed = wanted | ({HEAD_TENSOR: wanted[EMBEDDING_TENSOR]} if config.tie_embeddings else {})
    files: dict[str, Path] = {}
    dtypes: set[torch.dtype] = set()
    for path in find_weight_files(name):
        with open_weights(path) as file:
            names = file.keys()  # safe_open is no dictionary
            for tensor in (n for n in names if not n.endswith(DERIVED_SUFFIX)):
                header = file.get_slice(tensor)
                shape, kind = tuple(header.get_shape()), header.get_dtype()
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
                dtypes.add(FLOAT_DTYPES[kind])
    for tensor in wanted:
        require(tensor in files, f"{name}: {tensor} is missing")
    return files, reduce(torch.promote_types, dtypes)


def find_weight_files(name: str) -> list[Path]:
    """Returns the model's files of weights.

    Raises:
        InputError: naming the file, if one is missing or the index of several cannot be read.
    """
    if (whole := fetch_model_file(name, WEIGHTS_FILE)) is not None:
        return [whole]
    index = read_model_json(name, INDEX_FILE, f"there is no {WEIGHTS_FILE}")
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise InputError(f"{name}: {INDEX_FILE} has no weight_map")
    names = sorted(set(map(str, shards.values())))
    return [require_model_file(name, shard, f"{shard} is missing") for shard in names]


def open_weights(path: Path) -> safe_open:
    """Opens a file of weights. Raises InputError where it is damaged or none."""
    try:
        return safe_open(path, "pt", backend="pread")  # mapped, what was read would stay in memory
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error})") from error
