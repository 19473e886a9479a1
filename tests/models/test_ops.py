"""The choice between plain operations and others: on a CPU nothing of models/fused is touched."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models import SLM
from models.cpu_attention import MAX_CPU_CONTEXT, attend_on_cpu
from models.ops import PLAIN, choose_ops, fused_kernels_available, supports_fused_kernels
from tests.helpers.scripts import run_script
from tests.helpers.small_models import DENSE, MOE, for_each_config

CPU = torch.device("cpu")
TRAIN_ON_CPU = """
import sys
import torch
from models import SLM, next_token_loss
from tests.helpers.small_models import CONFIGS, windows
for config in CONFIGS.values():
    for is_bf16 in (False, True):
        tokens_BS = windows(config)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = next_token_loss(SLM(config)(tokens_BS[:, :-1]), tokens_BS)
        loss.backward()
assert not {name for name in sys.modules if name.startswith("models.fused")}
"""


def test_training_on_a_cpu_loads_no_fused_kernel():
    run_script(TRAIN_ON_CPU)


@for_each_config
def test_a_model_on_a_cpu_computes_with_plain_operations_under_autocast_too(config):
    assert not fused_kernels_available(config, CPU, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_ops(SLM(config)) is PLAIN


def test_fused_kernels_need_experts_of_whole_16_bytes_but_no_such_dense_layer():
    aligned = replace(MOE, d_model=48, d_ff=16)
    assert supports_fused_kernels(aligned)
    for sizes in ({"d_model": 12}, {"d_ff": 1365}):
        assert not supports_fused_kernels(replace(aligned, **sizes))
        assert supports_fused_kernels(replace(aligned, num_experts=0, **sizes))


@pytest.mark.parametrize(
    "dtype, length, is_two_products",
    [
        (torch.bfloat16, 9, True),
        (torch.bfloat16, MAX_CPU_CONTEXT, True),
        (torch.bfloat16, MAX_CPU_CONTEXT + 1, False),
        (torch.float32, 9, False),
    ],
)
def test_attention_is_two_products_for_short_contexts_in_bf16_and_torchs_elsewhere(
    dtype, length, is_two_products
):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 16).to(dtype) for heads in (4, 2, 2))
    two_products = attend_on_cpu(q, k, v)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert not torch.equal(two_products, torchs), "or the choice could not be seen"
    assert torch.equal(PLAIN.attend(q, k, v), two_products if is_two_products else torchs)


def test_rows_that_pad_a_head_count_for_nothing():
    torch.manual_seed(0)
    hidden_ND = torch.randn(7, 6, dtype=torch.double, requires_grad=True)
    head_VD = torch.randn(11, 6, dtype=torch.double, requires_grad=True)
    target_N = torch.randint(9, (7,))
    leaves = hidden_ND, head_VD
    loss = PLAIN.head_loss(hidden_ND, head_VD, target_N, vocab_size=9)
    expected = F.cross_entropy(hidden_ND @ head_VD[:9].T, target_N)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves))
    assert not grads[1][9:].any()


def test_a_block_that_adds_nothing_leaves_the_stream_as_it_was():
    model = SLM(DENSE)
    x_BTD = torch.randn(2, 5, DENSE.d_model)
    norm = model.norm
    alone = PLAIN.add_norm(x_BTD, None, norm)
    for result, expected in zip(alone, (x_BTD, norm(x_BTD)), strict=True):
        assert torch.equal(result, expected)
    for result, expected in zip(PLAIN.add_norm(x_BTD, 0 * x_BTD, norm), alone, strict=True):
        assert torch.equal(result, expected)
