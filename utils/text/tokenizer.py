"""Which tokenizer a run uses: one in a folder, one from the hub, or one learned on its own text."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from config import DataConfig, InputError, ModelConfig, require
from utils.runtime import hub
from utils.runtime.atomic_io import ADD_CHECKSUM, load_tensors
from utils.runtime.threads import call_interruptibly
from utils.text.sources import SEPARATOR
from utils.text.special_tokens import (
    CHAT_TEMPLATE,
    SETTINGS_FILES,
    SpecialTokens,
    find_special_tokens,
)

LEARNED_VOCAB_SIZE = 2048
LEARN_CHARS = 1 << 22
"""Characters to learn a vocabulary from; that of more text is much the same."""
LEARN_WORD_BYTES = 48
"""Longer words are cut to learn from them. Text without spaces, such as Chinese or DNA, is one word
up to its next punctuation, and the time to learn from a word grows with the square of its length.
A multiple of 3 and 4, so that few characters of any script are cut."""
TOKENIZER_JSON, SENTENCEPIECE_MODEL = "tokenizer.json", "tokenizer.model"


class TokenizerUnreachable(hub.HubUnreachable):
    """The hub did not deliver a tokenizer, though the text is to be had."""


def resolve_tokenizer_name(config: DataConfig) -> str:
    """Returns `learned`, or the folder or name on the hub that `data.tokenizer` stands for."""
    if config.tokenizer == "auto":
        return "learned" if config.source == "builtin" else hub.GPT2
    return hub.GPT2 if config.tokenizer == "gpt2" else config.tokenizer


def wanted_vocab_size(name: str, vocab_size: int) -> int:
    """Returns how many tokens a model with this tokenizer is to have room for; 0 for as many as it
    has. The default of `model.vocab_size` is GPT-2's number, which asks nothing of a learned one.
    """
    return 0 if name == "learned" and vocab_size == ModelConfig.vocab_size else vocab_size


def tokenizer_identity(name: str, vocab_size: int) -> list:
    """Returns plain values that are the same as long as the tokenizer is. Asks no hub.

    Raises:
        InputError: for a folder that holds no tokenizer or cannot be read.
    """
    if name == "learned":
        return ["learned", vocab_size or LEARNED_VOCAB_SIZE]
    if is_checkpoint(name):
        tokenizer, special_tokens = read_checkpoint_tokenizer(name)
        return ["checkpoint", tokenizer.to_str(), asdict(special_tokens)]
    try:
        if not is_local_path(name):
            return ["hub", name, hub.HUB_REVISIONS.get(name)]
        vocabulary = find_vocabulary(name)
        files = map(vocabulary.with_name, (vocabulary.name, CHAT_TEMPLATE, *SETTINGS_FILES))
        return ["folder", *(hub.hash_file(path) if path.is_file() else "" for path in files)]
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of no user
        raise InputError(f"data.tokenizer = {name}: cannot be read ({error})") from error


def is_checkpoint(name: str) -> bool:
    """Whether `name` is that of a checkpoint of this project."""
    return name.endswith(".pt")


def read_checkpoint_tokenizer(name: str) -> tuple[Tokenizer, SpecialTokens]:
    """Returns the tokenizer of a checkpoint of this project, and its special tokens. Raises
    InputError for a file that is missing, damaged or no checkpoint."""
    content = load_tensors(Path(name).expanduser(), remedy=ADD_CHECKSUM)
    try:
        special_tokens = SpecialTokens(**content["special_tokens"])
        return Tokenizer.from_str(content["tokenizer"]), special_tokens
    except Exception as error:  # the library raises nothing more particular
        reason = hub.first_line(error)
        raise InputError(f"data.tokenizer = {name} has no tokenizer ({reason})") from error


def is_local_path(name: str) -> bool:
    """Whether `name` is a folder or a .json file that exists, or could not be a name on the hub."""
    path = Path(name).expanduser()
    is_there = path.is_dir() or is_json_file(path)
    return is_there or path.is_absolute() or name.startswith(".") or name.count("/") > 1


def is_json_file(path: Path) -> bool:
    """Whether `path` is a file that may be a tokenizer.json."""
    return path.suffix == ".json" and path.is_file()


def load_tokenizer(
    name: str, vocab_size: int, text: Callable[[], Iterator[str]], eos_token: str = ""
) -> tuple[Tokenizer, SpecialTokens]:
    """Loads or learns a tokenizer.

    Args:
        name: `learned`, a folder, a name on the hub, or a checkpoint.
        vocab_size: How many tokens to learn; 0 takes LEARNED_VOCAB_SIZE.
        text: Reads the text to learn from.
        eos_token: The end-of-text token; empty takes the tokenizer's own.

    Returns:
        The tokenizer and its special tokens.

    Raises:
        InputError: for a tokenizer that is not there, is damaged or has no end-of-text token, and
            for a `vocab_size` that not every byte fits into.
        TokenizerUnreachable: if the hub does not deliver it.
    """
    if name == "learned":
        require(not eos_token, f"data.eos_token = {eos_token}: a learned tokenizer has its own")
        tokenizer = learn_tokenizer(text(), vocab_size or LEARNED_VOCAB_SIZE)
        size = embedding_rows(tokenizer)
        require(
            not vocab_size or size <= vocab_size,
            f"data.tokenizer = learned has {size} tokens, more than model.vocab_size = "
            f"{vocab_size} has room for",
        )
        return tokenizer, SpecialTokens((0,))  # special tokens come first
    try:
        return read_tokenizer(name, eos_token)
    except hub.HubUnreachable as error:
        raise TokenizerUnreachable(str(error)) from error


def read_tokenizer(name: str, eos_token: str = "") -> tuple[Tokenizer, SpecialTokens]:
    """Loads the tokenizer of a folder, of the hub or of a checkpoint. Returns it and its special
    tokens. `eos_token` is the end-of-text token to take; empty takes the tokenizer's own.

    Raises:
        InputError: for a tokenizer that is not there, is damaged or has no end-of-text token.
        HubUnreachable: if the hub does not deliver it.
    """
    if is_checkpoint(name):
        require(not eos_token, f"data.eos_token = {eos_token}: {name} has its own")
        return read_checkpoint_tokenizer(name)
    path = find_vocabulary(name)
    with explain_tokenizer_damage(name, path):
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = {file: read_settings(name, file) for file in SETTINGS_FILES}
    template = find_optional_file(name, CHAT_TEMPLATE)
    chat_template = template.read_text(encoding="utf-8") if template else ""
    return tokenizer, find_special_tokens(name, tokenizer, settings, chat_template, eos_token)


def find_vocabulary(name: str) -> Path:
    """Returns the path of a tokenizer's tokenizer.json. Raises InputError for a folder without."""
    path = find_tokenizer_file(name, TOKENIZER_JSON)
    require(
        path.is_file() or not path.with_name(SENTENCEPIECE_MODEL).is_file(),
        f"data.tokenizer = {name} has a {SENTENCEPIECE_MODEL} and no {TOKENIZER_JSON}: "
        f"AutoTokenizer.from_pretrained({name!r}).save_pretrained({name!r}) writes one "
        "(pip install sentencepiece protobuf)",
    )
    require(path.is_file(), f"data.tokenizer = {name}: no such folder with a {TOKENIZER_JSON}")
    return path


def find_tokenizer_file(name: str, file_name: str) -> Path:
    """Returns where a file of a tokenizer lies; in a folder it need not be there. A tokenizer.json
    that is named itself may have any name, and the other files lie beside it."""
    path = Path(name).expanduser()
    if is_json_file(path):
        return path if file_name == TOKENIZER_JSON else path.with_name(file_name)
    if is_local_path(name):
        return path / file_name
    return hub.fetch_hub_file(name, file_name)


@contextmanager
def explain_tokenizer_damage(name: str, path: Path) -> Iterator[None]:
    """Raises InputError, naming the file, where it cannot be read."""
    try:
        yield
    except Exception as error:  # the library raises nothing more particular
        reason = f"data.tokenizer = {name}: {path} is damaged ({hub.first_line(error)})"
        raise InputError(f"{reason}; put a whole one in its place, or delete it") from error


def find_optional_file(name: str, file_name: str) -> Path | None:
    """Returns where a file of a tokenizer lies; None where it has no such file."""
    if not is_local_path(name):
        return hub.fetch_optional_hub_file(name, file_name)
    path = find_tokenizer_file(name, file_name)
    return path if path.is_file() else None


def read_settings(name: str, file_name: str) -> dict:
    """Returns the content of one of a tokenizer's SETTINGS_FILES; empty if it has none."""
    path = find_optional_file(name, file_name)
    if path is None:
        return {}
    with explain_tokenizer_damage(name, path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def learn_tokenizer(text: Iterator[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE learned on the first LEARN_CHARS characters of a text.

    It has `vocab_size` tokens, or fewer if the text is short; the end-of-text token has id 0.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.FixedLength(LEARN_WORD_BYTES)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # it would write on stdout
    )
    # All parts at once: the thread then asks for nothing of a process that a signal is ending.
    parts = [list(take_chars(text, LEARN_CHARS))]
    with tqdm(desc="learning a vocabulary", bar_format="{desc} {elapsed}", disable=None) as bar:
        call_interruptibly(lambda: tokenizer.train_from_iterator(parts, trainer), bar.refresh)
    tokenizer.pre_tokenizer = words
    return tokenizer


def take_chars(text: Iterator[str], length: int) -> Iterator[str]:
    """Yields the first `length` characters of a text."""
    for part in text:
        yield part[:length]
        length -= len(part)
        if length <= 0:
            return


def check_token_ids(
    subject: str, ids: Sequence[int], tokenizer: Tokenizer, vocab_size: int
) -> None:
    """Raises InputError, naming `subject` and the token, where one of some ids has no row in an
    embedding of `vocab_size` rows. A tokenizer may have more tokens than that, and leave them
    unused."""
    highest = max(ids, default=0)
    require(
        highest < vocab_size,
        f"{subject}: token {highest} ({tokenizer.id_to_token(highest)!r}) is none of the model's, "
        f"which has {vocab_size} (model.vocab_size)",
    )


def embedding_rows(tokenizer: Tokenizer) -> int:
    """Returns the rows that a token embedding needs. A vocabulary may have holes, so that is the
    highest id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
