"""Text to tokens: which tokenizer, and the files of token ids."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from config import DataConfig, InputError, require
from utils import hub
from utils.encode import encoder
from utils.sources import SEPARATOR, Piece

LEARNED_SIZE = 2048
LEARN_FROM = 1 << 22
"""Characters; the vocabulary of more text is much the same."""
PARTS = ("tokenizer.json", "tokenizer_config.json")
BATCH = 1 << 20
"""Characters that are encoded at a time."""


def resolve(config: DataConfig) -> str:
    """The tokenizer that `auto` means: gpt2, but for the built-in stories one learned on them."""
    if config.tokenizer == "auto":
        return "learned" if config.source == "builtin" else hub.GPT2
    return hub.GPT2 if config.tokenizer == "gpt2" else config.tokenizer


def identity(name: str, vocab_size: int) -> list:
    """Plain values; the tokenizer is the same as long as they are. No hub is asked."""
    if name == "learned":
        return ["learned", vocab_size or LEARNED_SIZE]
    try:
        if not is_path(name):
            return ["hub", name, hub.REVISIONS.get(name)]
        file = vocabulary(name)
        return ["folder", *(digest(file.with_name(part)) for part in PARTS)]
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of no user
        raise InputError(f"data.tokenizer = {name}: cannot be read ({error})") from error


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def is_path(name: str) -> bool:
    """A folder that exists, or what could not be a name on the hub."""
    path = Path(name).expanduser()
    return path.is_dir() or path.is_absolute() or name.startswith(".") or name.count("/") > 1


def load(name: str, vocab_size: int, text: Callable[[], Iterator[str]]) -> tuple[Tokenizer, int]:
    """The tokenizer and its end-of-text token. `text` is what a learned one learns from."""
    if name == "learned":
        return learn(text(), vocab_size or LEARNED_SIZE), 0  # special tokens come first
    path = vocabulary(name)
    with intact(name, path):
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, end_of_text(name, tokenizer)


def vocabulary(name: str) -> Path:
    """Its tokenizer.json. Raises InputError for a folder that has none."""
    path = find(name, "tokenizer.json")
    require(path.is_file(), f"data.tokenizer = {name}: no such folder with a tokenizer.json")
    return path


def find(name: str, part: str) -> Path:
    return Path(name).expanduser() / part if is_path(name) else hub.file(name, part)


@contextmanager
def intact(name: str, path: Path) -> Iterator[None]:
    """Names the file where it cannot be read."""
    try:
        yield
    except Exception as error:  # the library raises nothing more particular
        what = f"data.tokenizer = {name}: {path} is damaged ({hub.brief(error)})"
        raise InputError(f"{what}; put a whole one in its place, or delete it") from error


def end_of_text(name: str, tokenizer: Tokenizer) -> int:
    """The token that ends a story: GPT-2's, else what the tokenizer's own settings say."""
    eos = tokenizer.token_to_id(SEPARATOR)
    if eos is not None:
        return eos
    said = settings(name).get("eos_token")
    said = said.get("content") if isinstance(said, dict) else said
    for token in (said, "</s>", "<|end_of_text|>"):
        if isinstance(token, str) and (eos := tokenizer.token_to_id(token)) is not None:
            return eos
    raise InputError(f"data.tokenizer = {name} has no token that ends a text, like {SEPARATOR}")


def settings(name: str) -> dict:
    """Empty where the tokenizer comes without."""
    try:
        path = find(name, "tokenizer_config.json")
    except hub.Absent:
        return {}
    if not path.exists():
        return {}
    with intact(name, path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def learn(text: Iterator[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(beginning(text, LEARN_FROM), trainer)
    return tokenizer


def beginning(text: Iterator[str], length: int) -> Iterator[str]:
    for part in text:
        yield part[:length]
        length -= len(part)
        if length <= 0:
            return


def size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs; a vocabulary may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def write(
    pieces: Iterable[tuple[bool, Piece]],
    tokenizer: Tokenizer,
    eos: int,
    dtype: np.dtype,
    train: Path,
    valid: Path,
) -> None:
    """Every story's tokens and `eos` after each, in the order in which they come."""
    encode, end = encoder(tokenizer, dtype), np.array(eos, dtype).tobytes()
    with train.open("wb") as train_file, valid.open("wb") as valid_file:
        for batch in in_batches(with_bar(pieces)):
            encoded = encode([piece.text for _, piece in batch])
            for (held_out, piece), ids in zip(batch, encoded, strict=True):
                file = valid_file if held_out else train_file
                file.write(ids + end if piece.ends else ids)


def with_bar(pieces: Iterable[tuple[bool, Piece]]) -> Iterator[tuple[bool, Piece]]:
    with tqdm(desc="tokenizing", unit=" stories", unit_scale=True, disable=None) as bar:
        for held_out, piece in pieces:
            yield held_out, piece
            bar.update(piece.ends)


def in_batches(pieces: Iterable[tuple[bool, Piece]]) -> Iterator[list[tuple[bool, Piece]]]:
    batch, length = [], 0
    for held_out, piece in pieces:
        batch.append((held_out, piece))
        length += len(piece.text)
        if length >= BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
