"""Whether transformers computes from an exported folder what the model itself does."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import ModelConfig
from transfer.drift import Drift, compare
from transfer.view import View, exact_matmul, look
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
    if not (drift.max_logit_diff <= allowed and drift.flipped <= drift.flips_allowed):
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
    views = []
    for window in probe_BS.split(1):
        with exact_matmul():
            out = model(window[:, :-1], use_cache=False, **routed)
        scores = out.router_logits if routed else ()
        chosen = [scores_TE.topk(config.top_k).indices for scores_TE in scores]
        views.append(View.of_one(out.logits, window, chosen))
    return View.of_all(views)


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
