"""Attention as two products defines nothing of its own: it is torch's, rounded no more than bf16
rounds. Where it is chosen is held in tests/models/test_ops.py."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models.cpu_attention import attend_on_cpu
from tests.helpers.small_models import relative_error

SHAPES = [
    (2, 4, 4, 256, 64),
    (1, 4, 2, 33, 16),
    (3, 2, 1, 1, 24),
    (1, 6, 2, 512, 64),
    (2, 1, 1, 7, 5),
]


def output_and_gradients(attend, inputs, direction_BHTK):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y_BHTK = attend(*leaves)
    return [y_BHTK, *torch.autograd.grad(y_BHTK, leaves, direction_BHTK)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_close_to_exact_attention_as_bf16_allows(shape):
    batch, heads, kv_heads, length, size = shape
    torch.manual_seed(0)
    inputs = [torch.randn(batch, n, length, size).bfloat16() for n in (heads, kv_heads, kv_heads)]
    direction_BHTK = torch.randn_like(inputs[0])
    torchs = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    exact = output_and_gradients(torchs, [x.double() for x in inputs], direction_BHTK.double())
    results = output_and_gradients(attend_on_cpu, inputs, direction_BHTK)
    errors = [relative_error(x, y, 1e-9) for x, y in zip(results, exact, strict=True)]
    assert max(errors) < torch.finfo(torch.bfloat16).eps, errors


def test_later_tokens_change_no_bit_of_earlier_ones():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16).bfloat16() for _ in range(3))
    before = attend_on_cpu(q, k, v)
    for x in (q, k, v):
        x[:, :, 25:] = torch.randn(1, 2, 15, 16)
    assert torch.equal(attend_on_cpu(q, k, v)[:, :, :25], before[:, :, :25])
