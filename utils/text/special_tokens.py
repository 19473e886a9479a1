"""The tokens that begin and end a text: which they are, and where a tokenizer puts them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, takewhile

from tokenizers import Tokenizer

from config import InputError
from utils.text.sources import SEPARATOR

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
CONFIG, SPECIAL_TOKENS_MAP = "config.json", "special_tokens_map.json"
SETTINGS_FILES = (TOKENIZER_CONFIG, GENERATION_CONFIG, CONFIG, SPECIAL_TOKENS_MAP)
"""Files beside a tokenizer that name special tokens: the first that names one is believed."""
CHAT_TEMPLATE = "chat_template.jinja"
USUAL_EOS_TOKENS = (SEPARATOR, "</s>", "<|end_of_text|>")
"""End-of-text tokens that are taken where no file names one."""


@dataclass(frozen=True)
class SpecialTokens:
    """What a model's texts begin and end with, and how a conversation becomes such a text."""

    stop_ids: tuple[int, ...]
    """Ids that end a generated text. The first is the end-of-text token, which ends every training
    text too."""
    bos_id: int | None = None
    """Id of the begin-of-text token; None where there is none."""
    chat_template: str | list = ""
    """What transformers makes a text of a conversation with; empty for none."""

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""
        return self.stop_ids[0]


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that a tokenizer puts in front of every text, like Llama's begin-of-text."""
    encoding = tokenizer.encode("a")
    added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1], added)]


def find_special_tokens(
    name: str, tokenizer: Tokenizer, settings: dict[str, dict], template: str, eos_token: str = ""
) -> SpecialTokens:
    """Returns the special tokens of a tokenizer.

    Args:
        name: What an error calls it.
        tokenizer: The tokenizer.
        settings: The content of each of SETTINGS_FILES, empty for one that is not there.
        template: The content of its CHAT_TEMPLATE, empty if there is none.
        eos_token: The end-of-text token to take. Empty takes the one that the first of
            SETTINGS_FILES names, else one of USUAL_EOS_TOKENS.

    Raises:
        InputError: for a tokenizer without an end-of-text token, or without `eos_token`.
    """

    def named_ids(kind: str) -> Iterator[int]:
        for file in SETTINGS_FILES:
            named = settings[file].get(f"{kind}_token"), settings[file].get(f"{kind}_token_id")
            yield from token_ids(tokenizer, *named)

    usual = (i for token in USUAL_EOS_TOKENS for i in token_ids(tokenizer, token))
    asked = token_ids(tokenizer, eos_token)
    if eos_token and not asked:
        raise InputError(f"data.eos_token = {eos_token}: the tokenizer {name} has no such token")
    eos_id = next(chain(asked, named_ids("eos"), usual), None)
    if eos_id is None:
        raise InputError(
            f"data.tokenizer = {name} has no token that ends a text, like {SEPARATOR}: "
            "name one of its tokens with --data.eos-token (--eos-token of utils.hf import)"
        )
    generation = (settings[file].get("eos_token_id") for file in (GENERATION_CONFIG, CONFIG))
    stop_ids = next((ids for i in generation if (ids := token_ids(tokenizer, None, i))), [])
    return SpecialTokens(
        stop_ids=tuple(dict.fromkeys([eos_id, *stop_ids])),
        bos_id=next(chain(start_ids(tokenizer), named_ids("bos")), None),
        chat_template=template or settings[TOKENIZER_CONFIG].get("chat_template") or "",
    )


def token_ids(tokenizer: Tokenizer, token: object, token_id: object = None) -> list[int]:
    """Returns the ids of a token, given its text, its id or several ids, as a file has them. What
    the tokenizer does not have is left out."""
    text = token_text(token)
    if text and (found := tokenizer.token_to_id(text)) is not None:
        return [found]
    ids = token_id if isinstance(token_id, list) else [token_id]
    numbers = [i for i in ids if type(i) is int and i >= 0]
    return [i for i in numbers if tokenizer.id_to_token(i) is not None]


def token_text(token: object) -> str:
    """Returns the text of a token in a settings file, which is a text or has one; else an empty
    text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""
