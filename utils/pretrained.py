"""A model in transformers' format: found in a folder or on the hub, read, and written."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import InputError, ModelConfig, TrainingConfig, require
from transfer import State
from utils import hub, llama, tokens
from utils.files import whole_folder, writing

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files beside the model that stay as they are when it grows."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHARD = 5 * 10**9
"""Bytes in a file of weights before another is begun."""


@dataclass(frozen=True)
class Pretrained:
    """A model of Llama's architecture, dense or a mixture. Its weights are not read yet."""

    name: str
    """A folder, or the name on the hub."""
    said: dict
    """Its config.json."""
    config: ModelConfig
    files: dict[str, Path]
    """Where each tensor is."""
    dtype: torch.dtype
    """The least that holds every tensor."""

    @property
    def balance_coef(self) -> float:
        """Weight of the load-balancing loss; the default here where a dense model has none."""
        said = llama.DEFAULTS[self.said["model_type"]] | self.said
        return said.get("router_aux_loss_coef", TrainingConfig.balance_coef)

    def state(self, dtype: torch.dtype | None = None) -> State:
        """The weights, of one precision. Raises InputError where one is not finite."""
        opened = {path: opening(path) for path in set(self.files.values())}

        def read(name: str) -> Tensor:
            tensor = opened[self.files[name]].get_tensor(name)
            finite = bool(torch.isfinite(tensor).all())
            require(finite, f"{self.name}: {name} is not finite")
            return tensor.to(dtype or self.dtype)

        if self.config.tied and "lm_head.weight" in self.files:
            same = torch.equal(read("lm_head.weight"), read("model.embed_tokens.weight"))
            require(same, f"{self.name}: tie_word_embeddings = true, but lm_head.weight differs")
        return State(self.config, llama.from_theirs(self.config, read))

    def fingerprint(self) -> str:
        """Equal models, equal fingerprints."""
        digest = hashlib.sha256(json.dumps(self.said, sort_keys=True).encode())
        for path in sorted(set(self.files.values())):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def find(name: str) -> Pretrained:
    """Raises InputError for what is not there, damaged, or not to be represented here, by name."""
    path = fetch(name, CONFIG)
    require(
        path is not None,
        f"{name}: there is no such model, no folder with a {CONFIG} and none on the hub",
    )
    try:
        said = dict(json.loads(Path(str(path)).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{name}: {CONFIG} cannot be read ({error})") from error
    try:
        config = llama.from_json(said)
    except InputError as error:
        raise InputError(f"{name}: {CONFIG}: {error}") from None
    files, dtype = survey(name, config)
    return Pretrained(name, said, config, files, dtype)


def title(name: str) -> str:
    """What a model is called elsewhere: its name on the hub, or that of its folder alone."""
    return Path(name).expanduser().resolve().name if name and tokens.is_path(name) else name


def fetch(name: str, part: str) -> Path | None:
    """A file of the model, here or on the hub; None where it has none like that."""
    if tokens.is_path(name):
        path = Path(name).expanduser() / part
        return path if path.is_file() else None
    try:
        return hub.file(name, part, "model", f"try a folder, {hub.OFFLINE}")
    except hub.Absent:
        return None


def survey(name: str, config: ModelConfig) -> tuple[dict[str, Path], torch.dtype]:
    """Where each tensor is, and a precision that holds them all."""
    wanted, files, dtypes = llama.their_shapes(config), {}, set()
    for path in weight_files(name):
        with opening(path) as file:
            for tensor in file.keys():  # noqa: SIM118  # it is no dict
                found = file.get_slice(tensor)
                if tensor.endswith("rotary_emb.inv_freq"):  # of old; it follows from the rest
                    continue
                tied = config.tied and tensor == "lm_head.weight"
                require(tied or tensor in wanted, f"{name}: {tensor} cannot be represented")
                shape = tuple(found.get_shape())
                want = wanted["model.embed_tokens.weight" if tied else tensor]
                require(shape == want, f"{name}: {tensor} is {shape}, not {want}")
                kind = found.get_dtype()
                require(kind in DTYPES, f"{name}: {tensor} is of type {kind}, not a plain float")
                files[tensor] = path
                dtypes.add(DTYPES[kind])
    for tensor in wanted:
        require(tensor in files, f"{name}: {tensor} is missing")
    return files, reduce(torch.promote_types, dtypes)


def weight_files(name: str) -> list[Path]:
    if (whole := fetch(name, WEIGHTS)) is not None:
        return [whole]
    index = fetch(name, INDEX)
    require(index is not None, f"{name}: there is no {WEIGHTS}")
    try:
        shards = sorted(set(json.loads(Path(str(index)).read_text())["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: {INDEX} cannot be read ({error})") from error
    paths = {shard: fetch(name, shard) for shard in shards}
    for shard, path in paths.items():
        require(path is not None, f"{name}: {shard} is missing")
    return [path for path in paths.values() if path is not None]


def opening(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt", backend="pread")  # mapped, what was read would stay in memory
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error})") from error


def save_weights(folder: Path, tensors: dict[str, Tensor], limit: int = SHARD) -> int:
    """In one file or, beyond `limit` bytes, in several with an index. Returns all bytes written."""
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        placed = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        size = sum(tensor.nbytes for tensor in tensors.values())
        save_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})
    for name, shard in zip(names, shards, strict=True):
        (folder / name).touch()
        usual = (folder / name).stat().st_mode
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (folder / name).chmod(usual)  # of its own it lets nobody else read what it writes
    return sum((folder / name).stat().st_size for name in names)


def save_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(folder: Path, overwrite: bool, size: int) -> Iterator[Path]:
    """Where to write what becomes `folder` once it is complete. Raises InputError for one that is
    there, unless it is a model's and to be overwritten, and where `size` bytes do not fit."""
    if folder.exists():
        require(overwrite, f"{folder} is there already: --overwrite replaces it")
        model = folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))
        require(model, f"{folder} is no model's folder (it has no {CONFIG}): it is left as it is")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.resolve().parent).free
        require(free > size, f"{folder}: {size / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")
        with whole_folder(folder) as part:
            yield part
