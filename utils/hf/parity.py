"""Whether transformers, reading an exported folder, computes what the model itself does."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import ModelConfig
from transfer import FunctionDrift
from transfer.checks import compare_outputs
from transfer.probe import ProbeOutput, exact_matmul, run_probe
from utils.checkpoint.model import Checkpoint
from utils.runtime.errors import RunStopped

MAX_RELATIVE_LOGIT_DIFF = 1e-5
"""Largest difference from transformers' logits, relative to the largest of them (or to 1)."""
PROBE_WINDOWS, PROBE_TOKENS = 4, 64
"""Number of windows that an exported or grown model is compared on, and tokens in each."""
CONTINUATION_TOKENS = 12
"""Number of tokens that transformers generates, with its cache and without."""


def check_parity(folder: Path, checkpoint: Checkpoint) -> FunctionDrift:
    """Compares the model that transformers reads from `folder` with the checkpoint's.

    Returns:
        How far transformers' logits and loss are from the model's own.

    Raises:
        RunStopped: if transformers computes other logits, chooses other experts, encodes text into
            other tokens, or generates other text with its cache than without.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config, probe = checkpoint.config, checkpoint.probe
    probe = random_probe(config) if probe is None else probe[:PROBE_WINDOWS, : PROBE_TOKENS + 1]
    drift = check_logits(model, checkpoint, probe)
    own = Tokenizer.from_str(checkpoint.tokenizer)
    text = own.decode(probe.flatten().tolist(), skip_special_tokens=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer(text)["input_ids"] != own.encode(text).ids:
        raise RunStopped("transformers' tokenizer gives other tokens; nothing is exported")
    check_generation(model, probe, config.seq_len)
    return drift


def random_probe(config: ModelConfig, seed: int = 0) -> Tensor:
    """Returns windows (B, T + 1) of random tokens."""
    length = min(PROBE_TOKENS, config.seq_len)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (PROBE_WINDOWS, length + 1), generator=generator)


def check_logits(model: Any, checkpoint: Checkpoint, probe_BS: Tensor) -> FunctionDrift:
    """Returns how far transformers' `model` is from the checkpoint's on windows (B, T + 1). Raises
    RunStopped if that is further than rounding takes it."""
    config = checkpoint.config
    own = run_probe(checkpoint.state.model(), probe_BS)
    with torch.no_grad(), exact_matmul():
        outputs = [run_hf_window(model, config, window) for window in probe_BS.split(1)]
    drift = compare_outputs(own, ProbeOutput.concatenate(outputs), [*range(config.n_layers)])
    allowed = MAX_RELATIVE_LOGIT_DIFF * max(1.0, own.logits_BTV.abs().max().item())
    if not (drift.max_logit_diff <= allowed and drift.flipped <= drift.flips_allowed):
        raise RunStopped(
            f"transformers' logits are off by {drift.max_logit_diff:.3g} (allowed: {allowed:.3g}), "
            f"{drift.flipped} tokens go to other experts; nothing is exported"
        )
    return drift


def run_hf_window(model: Any, config: ModelConfig, window: Tensor) -> ProbeOutput:
    """Returns what transformers' `model` computes on one window (1, T + 1)."""
    router = {"output_router_logits": True} if config.num_experts else {}
    output = model(window[:, :-1], use_cache=False, **router)
    layers = output.router_logits if router else ()
    expert_ids = [logits_TE.topk(config.top_k).indices for logits_TE in layers]
    return ProbeOutput.from_window(output.logits, window, expert_ids)


def check_generation(model: Any, probe_BS: Tensor, seq_len: int) -> None:
    """Raises RunStopped if transformers' `model` continues the start of a window otherwise with its
    cache than without. Nothing is generated beyond `seq_len` tokens."""
    start = probe_BS[:1, : max(1, (probe_BS.shape[1] - 1) // 2)]
    length = max(1, min(CONTINUATION_TOKENS, seq_len - start.shape[1]))
    cached, uncached = (
        model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=length,
            do_sample=False,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    if cached.tolist() != uncached.tolist():
        raise RunStopped("transformers generates otherwise with its cache; nothing is exported")
