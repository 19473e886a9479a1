"""Stories from a model:  python -m utils.generate CHECKPOINT "Once upon a time"."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import require
from models import SLM
from utils.checkpoint import load
from utils.cli import run_command
from utils.device import choose_device


@torch.no_grad()
def generate(
    model: SLM,
    tokens: list[int],
    length: int,
    eos: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator | None,
) -> list[int]:
    """Up to `length` tokens after `tokens`, ending before `eos`. Temperature 0: the likeliest."""
    device = next(model.parameters()).device
    text = list(tokens)
    for _ in range(length):
        context = torch.tensor([text[-model.config.seq_len :]], device=device)
        token = pick(model(context).logits[0, -1].float().cpu(), temperature, top_k, generator)
        if token == eos:
            break
        text.append(token)
    return text[len(tokens) :]


def pick(
    logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator | None
) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    best, index = logits_V.topk(min(top_k, len(logits_V)))
    chance = (best / temperature).softmax(-1)
    return int(index[torch.multinomial(chance, 1, generator=generator)])


def story(
    model: SLM,
    tokenizer: Tokenizer,
    eos: int,
    prompt: str,
    length: int,
    temperature: float = 0.8,
    top_k: int = 50,
    generator: torch.Generator | None = None,
) -> str:
    """`prompt` and what the model makes of it."""
    start = tokenizer.encode(prompt, add_special_tokens=False).ids
    require(len(start) > 0, f"prompt = {prompt!r} is empty")
    rest = generate(model, start, length, eos, temperature, top_k, generator)
    return tokenizer.decode(start + rest)


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
    print(story(model, tokenizer, saved.eos, prompt, length, temperature, top_k, generator))


if __name__ == "__main__":
    import tyro

    run_command(lambda: tyro.cli(main, prog="python -m utils.generate"))
