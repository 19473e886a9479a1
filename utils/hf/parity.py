"""Whether transformers, reading an exported folder, computes what the model itself does."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import ModelConfig, require
from transfer import FunctionDrift
from transfer.checks import FLOOR_FACTOR, compare_outputs, measure_rounding, run_twice
from transfer.probe import ProbeOutput, exact_matmul
from utils.checkpoint.model import Checkpoint
from utils.data import spread_starts, spread_windows
from utils.runtime.errors import RunStopped
from utils.runtime.hub import first_line
from utils.text.builtin.stories import builtin_stories
from utils.text.tokenizer import TOKENIZER_JSON, check_token_ids

PROBE_WINDOWS, PROBE_TOKENS = 4, 64
"""Number of windows that an exported or grown model is compared on, and tokens in each."""
MAX_CHARS_PER_TOKEN = 16
"""Characters that hold a token of the probe, and more."""
MIN_COMPARED_SHARE = 0.25
"""Share of the probe that no flipped routing may reach: transformers routes in float32, where a
flip is no fault, and one at the start of a window reaches all of it."""
PROBE_STORIES = 40
"""Number of built-in stories that hold enough text for the probe of any tokenizer."""
CONTINUATION_TOKENS = 12
"""Number of tokens that transformers generates, with its cache and without."""


def require_transformers() -> None:
    """Raises InputError where transformers, which checks what is written, is not installed."""
    require(
        find_spec("transformers") is not None,
        "what is written is checked with transformers, which is not here: "
        "pip install 'transformers>=5'",
    )


def load_with_transformers(folder: Path) -> tuple[Any, Any]:
    """Returns the model, in float32, and the tokenizer that transformers reads from a folder; None
    for the tokenizer of a folder without a tokenizer.json.

    Raises:
        RunStopped: if it refuses the folder.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        has_tokenizer = (folder / TOKENIZER_JSON).is_file()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    except Exception as error:  # it checks a configuration in many ways
        raise RunStopped(
            f"transformers cannot load it ({first_line(error)}); nothing is written"
        ) from error
    return model.eval(), tokenizer


def check_grown_folder(
    folder: Path, config: ModelConfig, own: tuple[ProbeOutput, ProbeOutput], probe: Tensor
) -> None:
    """Compares the model that transformers reads from `folder` with what a grown model computed on
    windows (B, T + 1), in float64 and in float32.

    Raises:
        RunStopped: if transformers refuses the folder, computes other logits or chooses other
            experts.
    """
    model, _ = load_with_transformers(folder)
    check_logits(model, config, own, probe)


def check_parity(folder: Path, checkpoint: Checkpoint) -> FunctionDrift:
    """Compares the model that transformers reads from `folder` with the checkpoint's.

    Returns:
        How far transformers' logits and loss are from the model's own.

    Raises:
        RunStopped: if transformers computes other logits, chooses other experts, encodes text into
            other tokens, or generates other text with its cache than without.
    """
    model, tokenizer = load_with_transformers(folder)
    config, own = checkpoint.config, Tokenizer.from_str(checkpoint.tokenizer)
    if checkpoint.probe is None:
        probe = text_probe(own, config, some_stories(), "the built-in text")
    else:
        probe = checkpoint.probe[:PROBE_WINDOWS, : PROBE_TOKENS + 1]
    drift = check_logits(model, config, run_twice(checkpoint.state.model(), probe), probe)
    text = own.decode(probe.flatten().tolist(), skip_special_tokens=False)
    if tokenizer(text)["input_ids"] != own.encode(text).ids:
        raise RunStopped("transformers' tokenizer gives other tokens; nothing is written")
    check_generation(model, probe, config.seq_len)
    return drift


def some_stories() -> str:
    """Returns enough of the built-in stories for a probe."""
    return "\n".join(builtin_stories(PROBE_STORIES))


def text_probe(tokenizer: Tokenizer, config: ModelConfig, text: str, source: str) -> Tensor:
    """Returns windows (B, T + 1) that are spread evenly over a text. Raises InputError, naming its
    `source`, if it is shorter than a window or has a token that the model has no row for."""
    length = min(PROBE_TOKENS, config.seq_len)
    size = MAX_CHARS_PER_TOKEN * (length + 1)
    is_long = len(text) > PROBE_WINDOWS * size  # a long text is not encoded whole
    starts = spread_starts(len(text), size, PROBE_WINDOWS).tolist() if is_long else []
    pieces = [text[start : start + size] for start in starts] or [text]
    windows = []
    for piece in pieces:
        ids = tokenizer.encode(piece, add_special_tokens=False).ids
        require(len(ids) > length, f"{source} has {len(ids)} tokens, not the {length + 1} needed")
        check_token_ids(source, ids, tokenizer, config.vocab_size)
        windows.append(spread_windows(np.array(ids), length, PROBE_WINDOWS // len(pieces)))
    return torch.cat(windows)


def check_logits(
    model: Any, config: ModelConfig, own: tuple[ProbeOutput, ProbeOutput], probe_BS: Tensor
) -> FunctionDrift:
    """Returns how far transformers' `model`, which computes norms and angles in float32 at most, is
    on windows (B, T + 1) from our `own` output, in float64 and in float32 (`run_twice`).

    Raises:
        RunStopped: if that is further than float32 takes our model from itself.
    """
    layers: list[int | None] = [*range(config.n_layers)]
    floor, in_float32 = measure_rounding(*own), compare_outputs(*own, layers)
    with torch.no_grad(), exact_matmul():
        outputs = [run_hf_window(model, config, window) for window in probe_BS.split(1)]
    drift = compare_outputs(own[0], ProbeOutput.concatenate(outputs), layers)
    allowed, margin = FLOOR_FACTOR * floor.logit, FLOOR_FACTOR * floor.margin
    flips = max(drift.flips_allowed, FLOOR_FACTOR * in_float32.flipped)
    is_same = drift.max_logit_diff <= allowed and drift.judged_share >= MIN_COMPARED_SHARE
    if not (is_same and drift.flipped <= flips and drift.flip_margin <= margin):
        raise RunStopped(
            f"transformers' logits are off by {drift.max_logit_diff:.3g} (allowed: {allowed:.3g}), "
            f"{drift.flipped} tokens go to other experts; nothing is written"
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
        raise RunStopped("transformers generates otherwise with its cache; nothing is written")
