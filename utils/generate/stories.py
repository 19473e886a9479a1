"""Stories that a trained model writes.

Shapes are as in model.py: B texts, T tokens, V tokens of the vocabulary, and C candidates.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import require
from models import SLM, KVCache
from utils.checkpoint.model import load_checkpoint
from utils.generate.sampling import Sampling
from utils.runtime.cli import decode_argument
from utils.runtime.device import choose_device
from utils.text.special_tokens import start_ids
from utils.text.tokenizer import check_token_ids

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Stands for bytes that are no character."""
TextTokens = Iterator[tuple[int, int | None]]
"""Tokens of several texts as they are drawn: the number of a text, and its next token, or None once
the text has ended."""


def sample_tokens(
    logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> list[int]:
    """Returns a token for each row of logits, drawn with the row's own generator."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    size = logits_BV.shape[1]
    best_BC, token_BC = (x.cpu() for x in logits_BV.topk(min(sampling.top_k or size, size)))
    prob_BC = ((best_BC - best_BC[:, :1]).double() / sampling.temperature).softmax(-1)
    likelier_BC = prob_BC.cumsum(-1) - prob_BC
    prob_BC = prob_BC.where(likelier_BC < sampling.top_p, 0.0)
    choices = [
        torch.multinomial(prob_C, 1, generator=generator)
        for prob_C, generator in zip(prob_BC, generators, strict=True)
    ]
    return token_BC.gather(1, torch.stack(choices)).flatten().tolist()


@torch.inference_mode()
def draw_tokens(
    model: SLM, starts: list[list[int]], length: int, stop_ids: Collection[int], sampling: Sampling
) -> TextTokens:
    """Continues several texts at once, each as if it were alone.

    Args:
        model: The model that gives the logits.
        starts: The tokens that each text begins with, at least one.
        length: The most tokens to add to each.
        stop_ids: Tokens of which each ends a text, and is not given out.
        sampling: How to draw.

    Yields:
        The number of a text and its next token, None once it has ended.
    """
    texts = [list(start) for start in starts]
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(texts))]
    slots = min(model.config.seq_len, max(map(len, texts), default=0) + length)
    cache = KVCache(model.config, len(texts), slots, like=model.norm.weight)
    unfinished = list(range(len(texts)))
    for _ in range(length):
        if not unfinished:
            return
        logits_BV = next_logits(model, [texts[i] for i in unfinished], cache)
        drawn = sample_tokens(logits_BV, sampling, [generators[i] for i in unfinished])
        for i, token in zip(unfinished, drawn, strict=True):
            texts[i].append(token)
            yield i, None if token in stop_ids else token
        rows = [row for row, token in enumerate(drawn) if token not in stop_ids]
        if len(rows) < len(unfinished):
            cache.select_rows(rows)
            unfinished = [unfinished[row] for row in rows]
    yield from ((i, None) for i in unfinished)


def next_logits(model: SLM, texts: list[list[int]], cache: KVCache) -> Tensor:
    """Returns the logits (B, V) of the token after each text. `cache` holds a beginning of each.

    Once a text is longer than the context, the context slides: all positions change, so the last
    seq_len tokens are read anew.
    """
    size = model.config.seq_len
    fits = max(map(len, texts)) <= size
    begins = cache.lengths if fits else [max(0, len(text) - size) for text in texts]
    unread = [torch.tensor(text[begin:]) for text, begin in zip(texts, begins, strict=True)]
    tokens_BT = pad_sequence(unread, batch_first=True).to(model.norm.weight.device)
    out = model(tokens_BT, cache if fits else None)
    if fits:
        cache.lengths = [len(text) for text in texts]  # forgets the padding
    return out.logits_at([len(tokens) - 1 for tokens in unread])


def generate(
    model: SLM, starts: list[list[int]], length: int, stop_ids: Collection[int], sampling: Sampling
) -> list[list[int]]:
    """Returns up to `length` tokens after each of `starts`, without the one of `stop_ids` that ends
    them. See `draw_tokens`."""
    added: list[list[int]] = [[] for _ in starts]
    for i, token in draw_tokens(model, starts, length, stop_ids, sampling):
        if token is not None:
            added[i].append(token)
    return added


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], vocab_size: int
) -> list[list[int]]:
    """Returns the tokens of each prompt, behind those that the tokenizer puts in front of a text.

    Raises:
        InputError: for a prompt that is no text, has no token, or has one that is none of the
            `vocab_size` tokens of the model.
    """
    first, starts = start_ids(tokenizer), []
    for prompt in prompts:
        text = decode_argument("prompt", prompt)
        starts.append(first + tokenizer.encode(text, add_special_tokens=False).ids)
        require(len(starts[-1]) > 0, f"prompt = {prompt!r} is empty")
        check_token_ids(f"prompt = {prompt!r}", starts[-1], tokenizer, vocab_size)
    return starts


def write_stories(
    model: SLM,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    prompts: Sequence[str],
    length: int,
    sampling: Sampling,
) -> list[str]:
    """Returns each of `prompts` and how the model continues it, in up to `length` tokens.

    Raises:
        InputError: for a prompt that `encode_prompts` refuses.
    """
    starts = encode_prompts(tokenizer, prompts, model.config.vocab_size)
    added = generate(model, starts, length, stop_ids, sampling)
    return [tokenizer.decode(start + more) for start, more in zip(starts, added, strict=True)]


def stream_stories(
    tokenizer: Tokenizer, starts: list[list[int]], drawn: TextTokens
) -> Iterator[str]:
    """Yields stories, one after the other with an empty line between them, in parts that come as
    soon as their tokens are drawn."""
    waiting = [deque[int | None](start) for start in starts]

    def tokens_of(story: int) -> Iterator[int]:
        while True:
            while not waiting[story]:
                i, token = next(drawn)
                waiting[i].append(token)
            if (token := waiting[story].popleft()) is None:
                return
            yield token

    for i in range(len(starts)):
        yield from stream_text(tokenizer, tokens_of(i))
        yield "\n\n" if i + 1 < len(starts) else "\n"


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of some tokens in parts: each character as soon as all its bytes have come,
    and at the end what is left of bytes that are no character."""
    stream, ids, length = DecodeStream(skip_special_tokens=True), [], 0
    for token in tokens:
        ids.append(token)
        try:
            part = stream.step(tokenizer, token) or ""
        except Exception:  # bytes that it took for a character are none with the next one
            stream, part = DecodeStream(skip_special_tokens=True), REPLACEMENT
        length += len(part)
        yield part
    yield tokenizer.decode(ids)[length:]


def print_stories(
    checkpoint: Path,
    prompts: tuple[str, ...],
    length: int,
    sampling: Sampling,
    device: str,
    unchecked: bool,
) -> None:
    """Prints the stories that a checkpoint's model makes of prompts, while it writes them. See
    `python -m utils.generate --help` for the options.

    Raises:
        InputError: for options, a checkpoint or prompts that cannot be used.
    """
    require(length >= 0, f"length = {length} must not be negative")
    require(len(prompts) > 0, "prompts = () is empty: say how a story begins")
    saved = load_checkpoint(checkpoint, unchecked)
    tokenizer = Tokenizer.from_str(saved.tokenizer)
    starts = encode_prompts(tokenizer, prompts, saved.config.vocab_size)
    # An imported model may have a router in float32 between layers in bfloat16.
    dtype = reduce(torch.promote_types, (weight.dtype for weight in saved.weights.values()))
    model = saved.state.model().to(choose_device(device), dtype)
    drawn = draw_tokens(model, starts, length, saved.special_tokens.stop_ids, sampling)
    for part in stream_stories(tokenizer, starts, drawn):
        print(part, end="", flush=True)
