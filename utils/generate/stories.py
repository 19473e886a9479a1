"""Stories that a trained model writes.

A story is a prompt behind `> `, what the model adds to it, and how that ended:

    > Once upon a time
    , there was a little cat.
    (end of text after 8 tokens)

Shapes are as in model.py: B texts, T tokens, V tokens of the vocabulary, and C candidates.
"""

import io
import sys
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import InputError, require
from models import SLM, KVCache
from utils.checkpoint.model import load_checkpoint
from utils.checkpoint.run_dir import find_checkpoint
from utils.generate.captured_pass import CapturedPass, is_worth_capturing
from utils.generate.sampling import Sampling
from utils.runtime.cli import decode_argument
from utils.runtime.device import choose_device
from utils.runtime.formatting import count_noun
from utils.runtime.signals import Stopped
from utils.text.special_tokens import start_ids
from utils.text.tokenizer import check_token_ids

PROMPT_MARK = "> "
"""Stands in front of each line of a prompt."""
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
    cached = unfinished = list(range(len(texts)))
    captured: CapturedPass | None = None
    for count in range(length):
        if not unfinished:
            return
        held = [texts[i] for i in cached]
        if captured and max(map(len, held)) > slots:
            captured = None
        if captured is None and len(unfinished) < len(cached):
            cache.select_rows([cached.index(i) for i in unfinished])
            cached, held = unfinished, [texts[i] for i in unfinished]
        if captured is None and is_worth_capturing(model, cache, held, length - count):
            captured = CapturedPass(model, cache)
        if captured:  # it goes on with texts that have ended, whose last token it reads again
            logits_BV = captured(held)[[cached.index(i) for i in unfinished]]
        else:
            logits_BV = next_logits(model, held, cache)
        drawn = sample_tokens(logits_BV, sampling, [generators[i] for i in unfinished])
        for i, token in zip(unfinished, drawn, strict=True):
            texts[i].append(token)
            yield i, None if token in stop_ids else token
        unfinished = [i for i in unfinished if texts[i][-1] not in stop_ids]
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


class Story(NamedTuple):
    """A prompt and how a model continues it."""

    prompt: str
    continuation: str
    ending: str
    """How it ended, as `describe_story_end` says it."""


def write_stories(
    model: SLM,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    prompts: Sequence[str],
    length: int,
    sampling: Sampling,
) -> list[Story]:
    """Returns a story for each of `prompts`, to which the model adds up to `length` tokens.

    Raises:
        InputError: for a prompt that `encode_prompts` refuses.
    """
    starts = encode_prompts(tokenizer, prompts, model.config.vocab_size)
    added = generate(model, starts, length, stop_ids, sampling)
    return [
        Story(
            prompt,
            tokenizer.decode(start + more)[len(tokenizer.decode(start)) :],
            describe_story_end(len(more), length),
        )
        for prompt, start, more in zip(prompts, starts, added, strict=True)
    ]


def format_story(story: Story) -> str:
    """Returns a story with the marks that say where it begins, where the model goes on, and where
    and how it ends."""
    return f"{mark_prompt(story.prompt)}\n{story.continuation}\n{story.ending}"


def mark_prompt(prompt: str) -> str:
    """Returns a prompt with PROMPT_MARK in front of each of its lines."""
    return "\n".join(PROMPT_MARK + line for line in prompt.split("\n"))


def describe_story_end(tokens: int, length: int) -> str:
    """Returns how a continuation ended that has so many tokens and could have `length`."""
    if tokens == length:
        return f"(cut off at the limit of {length} tokens)"
    return f"(end of text after {count_noun(tokens, 'token')})"


def stream_stories(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    starts: list[list[int]],
    drawn: TextTokens,
    length: int,
) -> Iterator[str]:
    """Yields stories as `format_story` tells them, one after the other with an empty line between
    them, in parts that come as soon as their tokens are drawn.

    Args:
        tokenizer: The tokenizer.
        prompts: How each story begins.
        starts: The tokens of each prompt.
        drawn: The tokens that are added, as `draw_tokens` yields them.
        length: The most tokens that could be added to each.
    """
    waiting = [deque[int | None]() for _ in starts]

    def tokens_of(story: int) -> Iterator[int]:
        while True:
            while not waiting[story]:
                i, token = next(drawn)
                waiting[i].append(token)
            if (token := waiting[story].popleft()) is None:
                return
            yield token

    for i, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        yield ("\n" if i else "") + mark_prompt(prompt) + "\n"
        yield from stream_continuation(tokenizer, start, tokens_of(i), length)


def stream_continuation(
    tokenizer: Tokenizer, start: list[int], tokens: Iterable[int], length: int
) -> Iterator[str]:
    """Yields in parts what up to `length` tokens add to the tokens `start`, and how that ended, on
    a line of its own."""
    count = yield from stream_text(tokenizer, start, tokens)
    yield f"\n{describe_story_end(count, length)}\n"


def stream_text(
    tokenizer: Tokenizer, start: list[int], tokens: Iterable[int]
) -> Generator[str, None, int]:
    """Yields the text that some tokens add to the tokens `start`, in parts: each character as soon
    as all its bytes have come, and at the end what is left of bytes that are no character. Returns
    how many tokens they were."""
    stream, ids, length = DecodeStream(skip_special_tokens=True), [], 0
    skip = len(tokenizer.decode(start))
    for token in chain(start, tokens):
        ids.append(token)
        try:
            part = stream.step(tokenizer, token) or ""
        except Exception:  # bytes that it took for a character are none with the next one
            stream, part = DecodeStream(skip_special_tokens=True), REPLACEMENT
        yield part[max(0, skip - length) :]
        length += len(part)
    yield tokenizer.decode(ids)[max(skip, length) :]
    return len(ids) - len(start)


def read_prompts(is_chat: bool) -> Iterator[str]:
    """Yields prompts from standard input, one a line: those typed at a PROMPT_MARK until an empty
    line or Ctrl-D, or without `is_chat` all lines that are not empty."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as arguments are decoded
    if not is_chat:
        yield from filter(str.strip, (line.rstrip("\r\n") for line in sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a history and keys to edit with
    try:
        while (line := input(PROMPT_MARK)).strip():
            yield line
    except EOFError:
        print()


def print_stories(
    checkpoint: Path,
    prompts: tuple[str, ...],
    length: int,
    sampling: Sampling,
    device: str,
    unchecked: bool,
) -> None:
    """Prints the stories that a model makes of prompts, or of the lines of standard input, while it
    writes them. See `python -m utils.generate --help` for the options.

    Raises:
        InputError: for options, a checkpoint or prompts that cannot be used.
    """
    require(length >= 0, f"length = {length} must not be negative")
    path = find_checkpoint(checkpoint)
    saved = load_checkpoint(path, unchecked)
    tokenizer = Tokenizer.from_str(saved.tokenizer)
    vocab_size, stop_ids = saved.config.vocab_size, saved.special_tokens.stop_ids
    starts = encode_prompts(tokenizer, prompts, vocab_size)
    # An imported model may have a router in float32 between layers in bfloat16.
    dtype = reduce(torch.promote_types, (weight.dtype for weight in saved.weights.values()))
    model = saved.state.model().to(choose_device(device), dtype)
    if path != checkpoint:
        print(f"{path}: phase {saved.phase_name}", file=sys.stderr)
    try:
        if prompts:
            drawn = draw_tokens(model, starts, length, stop_ids, sampling)
            print_parts(stream_stories(tokenizer, prompts, starts, drawn, length))
        else:
            answer_lines(model, tokenizer, stop_ids, length, sampling)
    except Stopped:
        print()  # ends the line that was being written
        raise


def answer_lines(
    model: SLM, tokenizer: Tokenizer, stop_ids: Collection[int], length: int, sampling: Sampling
) -> None:
    """Prints the story that each line of standard input begins, before it reads the next. In a
    terminal, where the line stands already, what the model adds to it, and what is wrong with it.

    Raises:
        InputError: for an input without a line, and for one that `encode_prompts` refuses, unless
            it was typed.
    """
    is_chat = sys.stdin.isatty() and sys.stdout.isatty()
    if sys.stdin.isatty():
        print("each line is a prompt; an empty line or Ctrl-D ends", file=sys.stderr)
    count = 0
    for prompt in read_prompts(is_chat):
        try:
            starts = encode_prompts(tokenizer, [prompt], model.config.vocab_size)
        except InputError as error:
            if not is_chat:
                raise
            print(f"error: {error}")
            continue
        own = replace(sampling, seed=sampling.seed + count)
        drawn = draw_tokens(model, starts, length, stop_ids, own)
        if is_chat:
            tokens = (token for _, token in drawn if token is not None)
            print_parts(stream_continuation(tokenizer, starts[0], tokens, length))
            print()
        else:
            print("\n" * bool(count), end="")
            print_parts(stream_stories(tokenizer, [prompt], starts, drawn, length))
        count += 1
    require(is_chat or count > 0, "prompts = () is empty, and standard input holds none")


def print_parts(parts: Iterable[str]) -> None:
    """Prints each part of a text as soon as it comes."""
    for part in parts:
        print(part, end="", flush=True)
