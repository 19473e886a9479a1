"""Stories from a model:  python -m utils.generate CHECKPOINT "Once upon a time" "One day"."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import require
from models import SLM, Cache
from utils.checkpoint import load
from utils.cli import run_command
from utils.device import choose_device

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character become without the others."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 50
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Of those, draw from the fewest whose chances add up to this."""
    seed: int = 0
    """Of the draws. Text i of several is what it would be alone with seed + i."""

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < inf,
            f"temperature = {self.temperature} must be finite and not negative",
        )
        require(self.top_k >= 0, f"top_k = {self.top_k} must not be negative")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p} must be above 0 and at most 1")
        require(0 <= self.seed < 2**63, f"seed = {self.seed} must be between 0 and 2^63 - 1")

    def pick(self, logits_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """A token for each row, drawn with the row's own generator."""
        if self.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        size = logits_BV.shape[1]
        best_BC, token_BC = (x.cpu() for x in logits_BV.topk(min(self.top_k or size, size)))
        chance_BC = ((best_BC - best_BC[:, :1]).double() / self.temperature).softmax(-1)
        likelier_BC = chance_BC.cumsum(-1) - chance_BC
        chance_BC = chance_BC.where(likelier_BC < self.top_p, 0.0)
        drawn = [
            torch.multinomial(chance_C, 1, generator=generator)
            for chance_C, generator in zip(chance_BC, generators, strict=True)
        ]
        return token_BC.gather(1, torch.stack(drawn)).flatten().tolist()


@torch.inference_mode()
def draws(
    model: SLM, starts: list[list[int]], length: int, eos: int, sampling: Sampling
) -> Iterator[tuple[int, int | None]]:
    """Which of the texts that begin with `starts` goes on, and with which token; None where it
    ends, before `eos` or after `length` tokens. All are written at once, each as if alone."""
    texts = [list(start) for start in starts]
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(texts))]
    slots = min(model.config.seq_len, max(map(len, texts), default=0) + length)
    cache = Cache(model.config, len(texts), slots, like=model.norm.weight)
    unfinished = list(range(len(texts)))
    for _ in range(length):
        if not unfinished:
            return
        logits_BV = next_logits(model, [texts[i] for i in unfinished], cache)
        drawn = sampling.pick(logits_BV, [generators[i] for i in unfinished])
        for i, token in zip(unfinished, drawn, strict=True):
            texts[i].append(token)
            yield i, token if token != eos else None
        going_on = [row for row, token in enumerate(drawn) if token != eos]
        if len(going_on) < len(unfinished):
            cache.keep(going_on)
            unfinished = [unfinished[row] for row in going_on]
    yield from ((i, None) for i in unfinished)


def next_logits(model: SLM, texts: list[list[int]], cache: Cache) -> Tensor:
    """(B, V) for the token after each text, of which `cache` holds a beginning. When one is longer
    than the context, that slides: all places change, so the last seq_len tokens are read anew."""
    size = model.config.seq_len
    fits = max(map(len, texts)) <= size
    begun = cache.lengths if fits else [max(0, len(text) - size) for text in texts]
    unread = [torch.tensor(text[start:]) for text, start in zip(texts, begun, strict=True)]
    tokens_BT = pad_sequence(unread, batch_first=True).to(model.norm.weight.device)
    out = model(tokens_BT, cache if fits else None)
    if fits:
        cache.lengths = [len(text) for text in texts]  # the padding is forgotten
    return out.logits_at([len(tokens) - 1 for tokens in unread])


def generate(
    model: SLM, starts: list[list[int]], length: int, eos: int, sampling: Sampling
) -> list[list[int]]:
    """Up to `length` tokens after each of `starts`, ending before `eos`."""
    more: list[list[int]] = [[] for _ in starts]
    for i, token in draws(model, starts, length, eos, sampling):
        if token is not None:
            more[i].append(token)
    return more


def encoded(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt. Raises InputError for one without any."""
    starts = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    for start, prompt in zip(starts, prompts, strict=True):
        require(len(start) > 0, f"prompt = {prompt!r} is empty")
    return starts


def stories(
    model: SLM,
    tokenizer: Tokenizer,
    eos: int,
    prompts: Sequence[str],
    length: int,
    sampling: Sampling,
) -> list[str]:
    """Each of `prompts` and what the model makes of it."""
    starts = encoded(tokenizer, prompts)
    rest = generate(model, starts, length, eos, sampling)
    return [tokenizer.decode(start + more) for start, more in zip(starts, rest, strict=True)]


def streamed(
    tokenizer: Tokenizer, starts: list[list[int]], drawn: Iterable[tuple[int, int | None]]
) -> Iterator[str]:
    """Pieces of the texts, one text after the other with an empty line between, each piece as soon
    as its tokens are `drawn` and its characters whole."""
    texts, ended, drawn = [list(start) for start in starts], set[int](), iter(drawn)
    for i, text in enumerate(texts):
        told = 0
        while True:
            story = tokenizer.decode(text)
            known = len(story if i in ended else story.rstrip(UNKNOWN))
            yield story[told:known]
            told = max(told, known)
            if i in ended:
                break
            which, token = next(drawn)
            if token is None:
                ended.add(which)
            else:
                texts[which].append(token)
        yield "\n\n" if i + 1 < len(texts) else "\n"


def main(
    checkpoint: Path,
    prompts: tuple[str, ...],
    /,
    length: int = 200,
    temperature: float = Sampling.temperature,
    top_k: int = Sampling.top_k,
    top_p: float = Sampling.top_p,
    seed: int = Sampling.seed,
    device: str = "auto",
) -> None:
    """Prints the stories that a checkpoint's model makes of prompts, as they come.

    Args:
        checkpoint: A .pt file of a run.
        prompts: How each story begins.
        length: Most tokens to write to each. Beyond the model's context, of which only the end is
            seen, this is slow.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw from this many of the likeliest tokens; 0 draws from all.
        top_p: Of those, draw from the fewest whose chances add up to this.
        seed: Of the draws. Story i of several is what it would be alone with seed + i.
        device: auto (CUDA, then MPS, then CPU), cuda, cuda:1, mps, cpu.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    require(length >= 0, f"length = {length} must not be negative")
    require(len(prompts) > 0, "prompts = () is empty: say how a story begins")
    saved = load(checkpoint)
    tokenizer = Tokenizer.from_str(saved.tokenizer)
    starts = encoded(tokenizer, prompts)
    model = saved.state.model().to(choose_device(device))
    for piece in streamed(tokenizer, starts, draws(model, starts, length, saved.eos, sampling)):
        print(piece, end="", flush=True)


if __name__ == "__main__":
    import tyro

    run_command(lambda: tyro.cli(main, prog="python -m utils.generate"))
