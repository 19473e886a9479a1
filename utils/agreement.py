"""Whether transformers computes from an exported folder what the model itself does."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from config import ModelConfig
from transfer.drift import FLIPS_ALLOWED, Drift, View, compare, exact_matmul, look
from utils.checkpoint import Checkpoint
from utils.errors import RunStopped

LOGITS_ALLOWED = 1e-5
"""Difference from transformers' logits, relative to the largest of them (or to 1)."""
PROBE = (4, 64)
"""Windows, and tokens in each, that an exported or grown model is compared on."""
CONTINUED = 12
"""Tokens that transformers goes on for, with its cache and without."""


class Out(Protocol):
    """Of transformers' models."""

    logits: Tensor
    router_logits: tuple[Tensor, ...]


def check(folder: Path, saved: Checkpoint) -> Drift:
    """Raises RunStopped unless transformers computes from `folder` what the checkpoint's model
    does, encodes text as its tokenizer does, and generates the same with its cache as without."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    probe = random_probe(saved.config) if saved.probe is None else saved.probe
    probe = probe[: PROBE[0], : PROBE[1] + 1]

    ours = look(saved.state.model(), probe)
    theirs = look_at_theirs(model, saved.config, probe)
    drift = compare(ours, theirs, list(range(saved.config.n_layers)))
    allowed = LOGITS_ALLOWED * max(1.0, ours.logits_BTV.abs().max().item())
    flips = max(1, FLIPS_ALLOWED * drift.probe_tokens)
    if not (drift.max_logit_diff <= allowed and drift.flipped <= flips):
        raise RunStopped(
            f"transformers' logits are off by {drift.max_logit_diff:.3g} (allowed: {allowed:.3g}), "
            f"{drift.flipped} tokens go to other experts; nothing is exported"
        )
    own = Tokenizer.from_str(saved.tokenizer)
    text = own.decode(probe.flatten().tolist(), skip_special_tokens=False)
    if tokenizer(text)["input_ids"] != own.encode(text).ids:
        raise RunStopped("transformers' tokenizer gives other tokens; nothing is exported")
    generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]  # of a mixin
    room = saved.config.seq_len
    cached, uncached = (continuation(generate, probe, room, use) for use in (True, False))
    if cached != uncached:
        raise RunStopped("transformers generates otherwise with its cache; nothing is exported")
    return drift


def random_probe(config: ModelConfig, seed: int = 0) -> Tensor:
    """Windows (B, T + 1) of random tokens."""
    batch, length = PROBE[0], min(PROBE[1], config.seq_len)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length + 1), generator=generator)


@torch.no_grad()
def look_at_theirs(model: Callable[..., Out], config: ModelConfig, probe_BS: Tensor) -> View:
    """What transformers' model makes of windows (B, T + 1)."""
    routed = {"output_router_logits": True} if config.num_experts else {}
    logits, losses, choices = [], [], []
    for window in probe_BS.split(1):
        with exact_matmul():
            out = model(window[:, :-1], use_cache=False, **routed)
        chosen = [
            scores.topk(config.top_k).indices.sort(-1).values
            for scores in (out.router_logits if routed else ())
        ]
        nothing = window.new_empty(0, window.shape[1] - 1, 0)
        logits.append(out.logits)
        losses.append(F.cross_entropy(out.logits[0], window[0, 1:], reduction="none")[None])
        choices.append((torch.stack(chosen) if chosen else nothing)[None])
    return View(torch.cat(logits), torch.cat(losses), torch.cat(choices))


def continuation(
    generate: Callable[..., Tensor], probe_BS: Tensor, room: int, use_cache: bool
) -> list[int]:
    """The likeliest tokens after the start of a window, within `room` tokens."""
    start = probe_BS[:1, : max(1, (probe_BS.shape[1] - 1) // 2)]
    return generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=max(1, min(CONTINUED, room - start.shape[1])),
        do_sample=False,
        use_cache=use_cache,
    )[0].tolist()
