"""The same architecture in transformers, trained as its users would: what a step is compared with.

The comparison is in the baselines' favour: their tokens lie on the device already, and their loss
is the cross-entropy alone, without the router's losses.
"""

import torch
import torch.nn.functional as F

from config import ModelConfig
from utils.benchmark.options import CompileMode
from utils.benchmark.setup import BenchmarkSetup
from utils.benchmark.timing import Work
from utils.hf.config_json import to_hf_config
from utils.runtime.device import autocast
from utils.schedule.phases import ResolvedPhase


def baseline_label(
    config: ModelConfig, run_dtype: torch.dtype, dtype: torch.dtype, mode: CompileMode | None
) -> str:
    """Returns the name of a baseline in tables, given the run's precision and its own."""
    family = "Mixtral" if config.num_experts else "Llama"
    mixed = "bf16 autocast" if run_dtype == torch.bfloat16 else "fp32"
    compiled = {None: "", "default": ", compiled"}.get(mode, f", {mode}")
    return f"{family} {mixed if dtype == torch.float32 else 'bf16'}{compiled}"


def make_baseline_model(
    config: ModelConfig, load_balance_coef: float, dtype: torch.dtype
) -> torch.nn.Module:
    """Returns a Llama or Mixtral of this shape with weights in `dtype`, and the implementations
    that transformers takes by itself: F.scaled_dot_product_attention, and F.grouped_mm for the
    experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = to_hf_config(config, load_balance_coef)
    experts = {"experts_implementation": "grouped_mm"} if config.num_experts else {}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**values, use_cache=False),
        attn_implementation="sdpa",
        dtype=dtype,
        **experts,
    )


def make_baseline_step(
    phase: ResolvedPhase,
    setup: BenchmarkSetup,
    dtype: torch.dtype,
    mode: CompileMode | None,
) -> tuple[Work]:
    """Makes a fresh model with weights and moments in `dtype`. Float32 weights are computed with in
    the run's precision.

    Returns:
        Its next training step, as the only work: loss, backward, clipping and fused AdamW.
    """
    config, training, device = phase.config, setup.run.training, setup.device
    with torch.device(device):
        model = make_baseline_model(config, training.load_balance_coef, dtype)
        tokens_BS = torch.randint(config.vocab_size, (phase.batch_size, config.seq_len + 1))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1e-4,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
        fused=True,
    )
    forward = torch.compile(model, mode=mode) if mode else model

    def step() -> None:
        if mode:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, setup.dtype if dtype == torch.float32 else torch.float32):
            logits_BTV = forward(tokens_BS[:, :-1]).logits
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BS[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return (step,)
