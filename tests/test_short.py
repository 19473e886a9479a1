"""Short windows in bf16 on a CPU: attention as two products is torch's own, and is what runs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small import DENSE
from torch.testing import assert_close

from models import SLM, short

SHAPES = [
    (2, 4, 4, 256, 64),
    (1, 4, 2, 33, 16),
    (3, 2, 1, 1, 24),
    (1, 6, 2, 512, 64),
    (2, 1, 1, 7, 5),
]


def attended(how, inputs, direction_BHTK):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y_BHTK = how(*leaves)
    return [y_BHTK, *torch.autograd.grad(y_BHTK, leaves, direction_BHTK)]


def errors(found, exact):
    """Euclidean, relative to the size of what is exact, of the output and of each gradient."""
    pairs = zip(found, exact, strict=True)
    return [((x.double() - y).norm() / y.norm().clamp(min=1e-9)).item() for x, y in pairs]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_close_to_exact_attention_as_bf16_allows(shape):
    batch, heads, kv_heads, length, size = shape
    torch.manual_seed(0)
    inputs = [torch.randn(batch, n, length, size).bfloat16() for n in (heads, kv_heads, kv_heads)]
    direction_BHTK = torch.randn_like(inputs[0])
    own = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    exact = attended(own, [x.double() for x in inputs], direction_BHTK.double())
    found = errors(attended(short.attend, inputs, direction_BHTK), exact)
    assert max(found) < torch.finfo(torch.bfloat16).eps, found


def test_what_comes_later_changes_no_bit_of_what_came_before():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16).bfloat16() for _ in range(3))
    before = short.attend(q, k, v)
    for x in (q, k, v):
        x[:, :, 25:] = torch.randn(1, 2, 15, 16)
    assert_close(short.attend(q, k, v)[:, :, :25], before[:, :, :25], rtol=0, atol=0)


@pytest.mark.parametrize("dtype, longest, runs", [
    (torch.bfloat16, 512, True), (torch.bfloat16, 8, False), (torch.float32, 512, False),
])  # fmt: skip
def test_it_runs_where_it_is_faster_and_nowhere_else(dtype, longest, runs, monkeypatch):
    calls = []
    monkeypatch.setattr(short, "LONGEST", longest)
    monkeypatch.setattr(short, "attend", lambda q, k, v: calls.append(1) or torch.zeros_like(q))
    tokens_BT = torch.zeros(2, 9, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        SLM(DENSE)(tokens_BT)
    assert len(calls) == DENSE.n_layers * runs
