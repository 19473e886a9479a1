"""Whether transformers, reading an exported folder, computes what the model itself does."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import ModelConfig, require
from transfer import FunctionDrift
from transfer.checks import FLOOR_FACTOR, compare_outputs, max_difference
from transfer.probe import ProbeOutput, exact_matmul, run_probe
from utils.checkpoint.model import Checkpoint
from utils.data import first_windows
from utils.runtime.errors import RunStopped
from utils.text.builtin.stories import builtin_stories

PROBE_WINDOWS, PROBE_TOKENS = 4, 64
"""Number of windows that an exported or grown model is compared on, and tokens in each."""
PROBE_STORIES = 40
"""Number of built-in stories that hold enough text for the probe of any tokenizer."""
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
    config, own = checkpoint.config, Tokenizer.from_str(checkpoint.tokenizer)
    if checkpoint.probe is None:
        probe = text_probe(own, config, some_stories(), "the text of the built-in stories")
    else:
        probe = checkpoint.probe[:PROBE_WINDOWS, : PROBE_TOKENS + 1]
    drift = check_logits(model, checkpoint, probe)
    text = own.decode(probe.flatten().tolist(), skip_special_tokens=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer(text)["input_ids"] != own.encode(text).ids:
        raise RunStopped("transformers' tokenizer gives other tokens; nothing is exported")
    check_generation(model, probe, config.seq_len)
    return drift


def some_stories() -> str:
    """Returns enough of the built-in stories for a probe."""
    return "\n".join(builtin_stories(PROBE_STORIES))


def text_probe(tokenizer: Tokenizer, config: ModelConfig, text: str, source: str) -> Tensor:
    """Returns windows (B, T + 1) of the beginning of a text. Raises InputError, naming its
    `source`, if it is shorter than a window."""
    length = min(PROBE_TOKENS, config.seq_len)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    require(len(ids) > length, f"{source} has {len(ids)} tokens, not the {length + 1} needed")
    return first_windows(np.array(ids), length, PROBE_WINDOWS * (length + 1))


def check_logits(model: Any, checkpoint: Checkpoint, probe_BS: Tensor) -> FunctionDrift:
    """Returns how far transformers' `model`, which computes norms and angles in float32 at most, is
    from the checkpoint's on windows (B, T + 1). Raises RunStopped if that is further than float32
    takes the model from itself in float64."""
    config, own_model = checkpoint.config, checkpoint.state.model()
    own = run_probe(own_model, probe_BS)
    floor = max_difference(run_probe(own_model, probe_BS, torch.float32), own)
    with torch.no_grad(), exact_matmul():
        outputs = [run_hf_window(model, config, window) for window in probe_BS.split(1)]
    drift = compare_outputs(own, ProbeOutput.concatenate(outputs), [*range(config.n_layers)])
    allowed = FLOOR_FACTOR * floor
    if not (max(drift.max_logit_diff, drift.flip_margin) <= allowed and drift.is_judged):
        raise RunStopped(
            f"transformers' logits are off by {drift.max_logit_diff:.3g} (allowed: {allowed:.3g}), "
            f"{drift.flipped} tokens go to other experts; nothing is exported"
        )
    return drift


def run_hf_window(model: Any, config: ModelConfig, window: Tensor) -> ProbeOutput:
    """Returns what transformers' `model` computes on one window (1, T + 1)."""
    router = {"output_router_logits": True} if config.num_experts else {}
    output = model(window[:, :-1], use_cache=False, **router)
    router_logits = [logits_TE[None] for logits_TE in output.router_logits] if router else []
    return ProbeOutput.from_logits(output.logits, window, router_logits, config.top_k)


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
