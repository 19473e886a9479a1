"""Models small enough to prove the fused step with, on a GPU: head sizes, groups and experts of
every sort that its kernels tell apart."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from config import ModelConfig, TrainingConfig
from models import SLM
from models.ops import fused_kernels_available
from tests.helpers.small_models import windows
from transfer import TrainState

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
DENSE = ModelConfig(
    vocab_size=97, d_model=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, d_ff=40, seq_len=65
)
MOE = replace(DENSE, num_experts=5, top_k=2)
CONFIGS = {
    "dense": DENSE,
    "learned, untied, scaled": replace(
        DENSE, position_embedding="learned", tie_embeddings=False, n_kv_heads=None, logit_scale=0.5
    ),
    "head of 128": replace(DENSE, d_model=256, n_heads=2, n_kv_heads=1, head_dim=None, d_ff=1408),
    "moe": MOE,
    "two choices of three": replace(MOE, num_experts=3, d_ff=136),
    "more experts than choices": replace(MOE, num_experts=24, top_k=3),
}
ODD_SIZES = replace(DENSE, d_model=36, d_ff=41)
"""Sizes that are no multiples of 8, which a dense model may have."""
TRAINING = TrainingConfig()
needs_fused_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() and fused_kernels_available(DENSE, CUDA, BF16)),
    reason="needs a CUDA device and Triton",
)
for_each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def cuda_train_state(config: ModelConfig) -> TrainState:
    """Returns random float32 weights on the GPU, gains included, without moments."""
    torch.manual_seed(0)
    weights = TrainState.from_model(SLM(config)).weights.items()
    return TrainState(config, {n: (w + 0.1 * torch.randn_like(w)).to(CUDA) for n, w in weights})


def cuda_windows(config: ModelConfig, batch: int, length: int, seed: int = 1) -> Tensor:
    """Returns random tokens (B, T + 1) on the GPU."""
    return windows(config, batch, length, seed).to(CUDA)
