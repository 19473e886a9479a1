"""The same architecture in transformers, trained as its users would: what a step is compared with.

The comparison is in the peers' favour: their tokens lie on the device already and their loss is the
cross-entropy alone, without the router's.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from config import ModelConfig, TrainingConfig, require
from utils.device import autocast

Mode = Literal["default", "reduce-overhead"]


class Peer(NamedTuple):
    """A way to train transformers' model."""

    pure: bool
    """Weights and moments are bf16 too; otherwise float32, in the run's precision."""
    mode: Mode | None = None
    """Of torch.compile; None: not compiled."""

    def label(self, config: ModelConfig, dtype: torch.dtype) -> str:
        name = "Mixtral" if config.num_experts else "Llama"
        mixed = "bf16 autocast" if dtype == torch.bfloat16 else "fp32"
        compiled = f", compiled ({self.mode})" if self.mode else ""
        return f"{name} {'bf16' if self.pure else mixed}{compiled}"


def peers(plain: bool, modes: tuple[Mode, ...]) -> list[Peer]:
    """Raises InputError where they are asked for and transformers is not installed."""
    chosen: list[Mode | None] = [*([None] if plain else []), *modes]
    require(
        not chosen or find_spec("transformers") is not None,
        "peer = True needs the package transformers",
    )
    return [Peer(pure, mode) for mode in chosen for pure in (False, True)]


def peer_model(config: ModelConfig) -> torch.nn.Module:
    """Llama or Mixtral of this shape, with the implementations that transformers takes by itself:
    F.scaled_dot_product_attention, and F.grouped_mm for the experts."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if not config.num_experts:
        return LlamaForCausalLM(LlamaConfig(**shape))  # pyright: ignore
    experts = {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "experts_implementation": "grouped_mm",
    }
    return MixtralForCausalLM(MixtralConfig(**shape, **experts))  # pyright: ignore


def peer_step(
    peer: Peer,
    config: ModelConfig,
    batch_size: int,
    settings: TrainingConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """The next training step: loss, backward, clipping and fused AdamW."""
    with torch.device(device):
        model = peer_model(config)
        tokens_BS = torch.randint(config.vocab_size, (batch_size, config.seq_len + 1))
    if peer.pure:
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1e-4,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    run = torch.compile(model, mode=peer.mode) if peer.mode else model
    precision = torch.float32 if peer.pure else dtype

    def step() -> None:
        if peer.mode:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, precision):
            logits_BTV = run(tokens_BS[:, :-1]).logits
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BS[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step
