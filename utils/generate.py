"""Stories from a model:  python -m utils.generate CHECKPOINT "Once upon a time"."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import require
from models import SLM
from utils.checkpoint import load
from utils.cli import run_command
from utils.device import choose_device


@torch.no_grad()
def generate(
    model: SLM,
    starts: list[list[int]],
    length: int,
    eos: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator | None,
) -> list[list[int]]:
    """Up to `length` tokens after each of `starts`, ending before `eos`. Temperature 0: the
    likeliest. All texts are written at once; no token sees what pads the shorter ones, after it."""
    device = next(model.parameters()).device
    texts = [list(start) for start in starts]
    unfinished = texts
    for _ in range(length):
        if not unfinished:
            break
        contexts = [torch.tensor(text[-model.config.seq_len :]) for text in unfinished]
        last = [len(context) - 1 for context in contexts]
        tokens_BT = pad_sequence(contexts, batch_first=True).to(device)
        logits_BV = model(tokens_BT).logits[range(len(last)), last].float().cpu()
        drawn = [pick(logits_V, temperature, top_k, generator) for logits_V in logits_BV]
        for text, token in zip(unfinished, drawn, strict=True):
            text += [token] * (token != eos)
        unfinished = [text for text, token in zip(unfinished, drawn, strict=True) if token != eos]
    return [text[len(start) :] for text, start in zip(texts, starts, strict=True)]


def pick(
    logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator | None
) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    best, index = logits_V.topk(min(top_k, len(logits_V)))
    chance = (best / temperature).softmax(-1)
    return int(index[torch.multinomial(chance, 1, generator=generator)])


def stories(
    model: SLM,
    tokenizer: Tokenizer,
    eos: int,
    prompts: Sequence[str],
    length: int,
    temperature: float = 0.8,
    top_k: int = 50,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Each of `prompts` and what the model makes of it."""
    starts = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    for start, prompt in zip(starts, prompts, strict=True):
        require(len(start) > 0, f"prompt = {prompt!r} is empty")
    rest = generate(model, starts, length, eos, temperature, top_k, generator)
    return [tokenizer.decode(start + more) for start, more in zip(starts, rest, strict=True)]


def main(
    checkpoint: Path,
    prompt: str,
    /,
    length: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Prints the story that a checkpoint's model makes of a prompt.

    Args:
        checkpoint: A .pt file of a run.
        prompt: How the story begins.
        length: Most tokens to write.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw from this many of the likeliest tokens.
    """
    require(length >= 0, f"length = {length} must not be negative")
    require(temperature >= 0, f"temperature = {temperature} must not be negative")
    require(top_k >= 1, f"top_k = {top_k} must be at least 1")
    saved = load(checkpoint)
    model = saved.state.model().to(choose_device(device)).eval()
    generator = torch.Generator().manual_seed(seed)
    tokenizer = Tokenizer.from_str(saved.tokenizer)
    told = stories(model, tokenizer, saved.eos, [prompt], length, temperature, top_k, generator)
    print(told[0])


if __name__ == "__main__":
    import tyro

    run_command(lambda: tyro.cli(main, prog="python -m utils.generate"))
