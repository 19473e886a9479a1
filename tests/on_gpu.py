"""Models of a size to prove the fused step with, on a GPU: head sizes, groups and experts of every
sort that its kernels tell apart."""

from dataclasses import replace

import pytest
import torch

from config import ModelConfig, TrainingConfig
from models import SLM, fused
from transfer import State

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
NEEDS_GPU = pytest.mark.skipif(
    not (torch.cuda.is_available() and fused.available(CUDA, BF16)), reason="no CUDA or no Triton"
)
DENSE = ModelConfig(
    vocab_size=97, d_model=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, d_ff=40, seq_len=65
)
MOE = replace(DENSE, num_experts=5, top_k=2)
CONFIGS = {
    "dense": DENSE,
    "learned, untied, scaled": replace(
        DENSE, position="learned", tied=False, n_kv_heads=None, logit_scale=0.5
    ),
    "head of 128": replace(DENSE, d_model=256, n_heads=2, n_kv_heads=1, head_dim=None, d_ff=1408),
    "moe": MOE,
    "one choice of three": replace(MOE, num_experts=3, top_k=1, d_ff=136),
    "more experts than choices": replace(MOE, num_experts=24, top_k=3),
}
ODD = replace(DENSE, d_model=36, d_ff=41)
"""Sizes that are no multiples of 8, which a dense model may have."""
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
SETTINGS = TrainingConfig()


def at_rest(config, seed=0):
    torch.manual_seed(seed)
    weights = State.of(SLM(config)).weights.items()
    return State(config, {n: (w + 0.1 * torch.randn_like(w)).to(CUDA) for n, w in weights})


def windows(config, batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, length + 1
    return torch.randint(config.vocab_size, shape, generator=generator).to(CUDA)


def off(got, want, least=1e-12):
    return ((got - want).norm() / want.norm().clamp_min(least)).item()
