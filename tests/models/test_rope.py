"""Rotary angles and their scaling. tests/models/test_oracle.py holds whole models to those of
transformers."""

from dataclasses import replace

import pytest
import torch

from config import RopeScaling
from models.rope import apply_rope, rope_cos_sin, scale_rope_frequencies
from tests.helpers.small_models import DENSE


def test_rotary_positions_enter_attention_only_as_distances():
    q_TK, k_TK = torch.randn(2, 1, DENSE.head_size).double().expand(2, DENSE.seq_len, -1)
    rope = rope_cos_sin(torch.arange(DENSE.seq_len), DENSE, q_TK)
    score_TT = apply_rope(q_TK, *rope) @ apply_rope(k_TK, *rope).T
    torch.testing.assert_close(score_TT[1:, 1:], score_TT[:-1, :-1])
    assert score_TT[0].unique().numel() == DENSE.seq_len


def test_positions_are_counted_exactly_where_the_model_is_in_bf16():
    config, far = replace(DENSE, seq_len=4096), torch.arange(4000, 4096)
    exact = rope_cos_sin(far, config, torch.zeros(1))
    rounded = rope_cos_sin(far, config, torch.zeros(1, dtype=torch.bfloat16))
    assert all(torch.equal(x.bfloat16(), y) for x, y in zip(exact, rounded, strict=True))


CYCLES = torch.tensor([0.25, 1.0, 2.5, 4.0, 90.0], dtype=torch.double)
"""How often each wavelength fits into the original context."""


@pytest.mark.parametrize(
    "rope_type, expected",
    [
        ("default", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.125, 0.125, 0.125, 0.125, 0.125]),
        ("llama3", [0.125, 0.125, 0.5625, 1.0, 1.0]),
    ],
)
def test_scaling_stretches_all_wavelengths_or_the_long_ones_alone(rope_type, expected):
    scaling = RopeScaling(rope_type, factor=8.0, original_max_position_embeddings=32)
    frequency = CYCLES * 2 * torch.pi / 32
    factor = scale_rope_frequencies(frequency, scaling) / frequency
    torch.testing.assert_close(factor, torch.tensor(expected, dtype=torch.double))
