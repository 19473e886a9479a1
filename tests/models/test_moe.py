from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from models import SLM, moe, next_token_loss
from models.model import MLP
from models.moe import ROW_MULTIPLE, MoE, grouped_linear, has_grouped_mm, is_faster_padded
from tests.helpers.small_models import MOE, random_model, reference_loss, windows

ALIGNED = replace(MOE, d_model=48, n_heads=6, d_ff=16)
"""Rows of whole 16 bytes in float32 and in bf16, which torch's grouped product takes."""
UNALIGNED = replace(MOE, d_model=12, d_ff=10)
"""Rows that it does not take."""
for_both_products = pytest.mark.parametrize(
    "config", [ALIGNED, UNALIGNED], ids=["grouped", "looped"]
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_experts(config, scale=0.5):
    torch.manual_seed(0)
    moe = MoE(config).double()
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=scale)
    return moe


def random_inputs(config, tokens, dtype=torch.double):
    generator = torch.Generator().manual_seed(2)
    x_BTD = torch.randn(1, tokens, config.d_model, generator=generator, dtype=torch.double)
    return x_BTD.to(dtype).requires_grad_()


def token_by_token(moe, x_BTD):
    """Returns what the layer defines, one token and one expert at a time."""
    y_ND = []
    for x_D in x_BTD.flatten(0, 1):
        best = (moe.router.weight @ x_D).topk(moe.router.top_k)
        y_D = torch.zeros_like(x_D)
        for weight, e in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
            h_F = F.silu(moe.gate_proj[e] @ x_D) * (moe.up_proj[e] @ x_D)
            y_D = y_D + weight * (moe.down_proj[e] @ h_F)
        y_ND.append(y_D)
    return torch.stack(y_ND).view_as(x_BTD)


def layer_output(moe, x_BTD):
    return moe(x_BTD)[0]


def value_and_gradients(function, moe, x_BTD):
    y_BTD = function(moe, x_BTD)
    return y_BTD, *grad(y_BTD.double().sin().sum(), [x_BTD, *moe.parameters()])


def assert_near(results, targets, tolerance):
    """Compares tensors, each relative to the target's largest entry."""
    for result, target in zip(results, targets, strict=True):
        size = target.abs().max().clamp_min(1e-9)
        torch.testing.assert_close(result.double() / size, target / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize("top_k", [2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 40])
def test_every_token_gets_the_weighted_sum_of_its_experts(tokens, top_k):
    moe, x_BTD = random_experts(replace(MOE, top_k=top_k)), random_inputs(MOE, tokens)
    expected = value_and_gradients(token_by_token, moe, x_BTD)
    assert_near(value_and_gradients(layer_output, moe, x_BTD), expected, 1e-12)


@pytest.mark.parametrize("tokens", [1, 40])
@for_both_products
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_grouped_product_and_the_loop_agree_with_float64(config, tokens, dtype, tolerance):
    moe = random_experts(config, 0.2)
    expected = value_and_gradients(token_by_token, moe, random_inputs(config, tokens))
    assert has_grouped_mm(moe.gate_proj.to(dtype)) == (config is ALIGNED)
    x_BTD = random_inputs(config, tokens, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        results = value_and_gradients(layer_output, moe.float(), x_BTD)
    assert_near(results, expected, tolerance)


@pytest.mark.parametrize("config", [MOE, ALIGNED, UNALIGNED])
def test_experts_that_get_no_token_get_no_gradient(config):
    moe, x_BTD = random_experts(config).float(), random_inputs(config, 1, torch.float32)
    y_BTD, routing = moe(x_BTD)
    is_idle_E = routing.load_E == 0
    assert is_idle_E.sum() == config.num_experts - config.top_k
    for gradient in grad(y_BTD.sum(), [moe.gate_proj, moe.up_proj, moe.down_proj]):
        assert (gradient[is_idle_E] == 0).all() and (gradient[~is_idle_E] != 0).any()


@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_equal_experts_are_the_dense_layer_whatever_the_router(top_k):
    moe, dense = random_experts(replace(MOE, top_k=top_k)), MLP(MOE).double()
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            moe.get_parameter(name.removesuffix(".weight"))[:] = weight
    x_BTD = random_inputs(MOE, 40)
    torch.testing.assert_close(moe(x_BTD)[0], dense(x_BTD))


def test_routing_tells_which_experts_were_chosen_and_how_often():
    moe, x_BTD = random_experts(MOE), random_inputs(MOE, 40)
    _, routing = moe(x_BTD)
    logits_NE = x_BTD.flatten(0, 1) @ moe.router.weight.T
    torch.testing.assert_close(routing.logits_NE, logits_NE)
    assert torch.equal(routing.expert_ids_NC, logits_NE.argsort(descending=True)[:, :2])
    load_E = [(routing.expert_ids_NC == e).sum() / 80 for e in range(5)]
    torch.testing.assert_close(routing.load_E, torch.tensor(load_E, dtype=torch.double))
    assert routing.load_E.sum().item() == pytest.approx(1)


def test_autocast_does_not_round_the_routers_logits():
    moe, x_BTD = random_experts(ALIGNED).float(), random_inputs(ALIGNED, 40, torch.float32)
    expected = moe(x_BTD)[1]
    with torch.autocast("cpu", torch.bfloat16):
        routing = moe(x_BTD)[1]
    assert all(torch.equal(one, other) for one, other in zip(routing, expected, strict=True))


def test_z_loss_is_the_mean_square_of_the_log_of_the_softmax_denominator():
    moe, x_BTD = random_experts(MOE), random_inputs(MOE, 40)
    denominator_N = (x_BTD.flatten(0, 1) @ moe.router.weight.T).exp().sum(-1)
    torch.testing.assert_close(moe(x_BTD)[1].z_loss, denominator_N.log().square().mean())


@pytest.mark.parametrize("top_k", [2, 4])
def test_the_balance_loss_is_top_k_where_routing_is_fair_and_grows_to_num_experts(top_k):
    moe = random_experts(replace(MOE, num_experts=4, top_k=top_k))
    fair_BTD = torch.eye(4, MOE.d_model, dtype=torch.double)[None]
    with torch.no_grad():
        moe.router.weight[:, :4] = 2 * torch.eye(4) + torch.eye(4).roll(1, 0)
        _, routing = moe(fair_BTD)
        assert routing.load_balance_loss.item() == pytest.approx(top_k)
        assert routing.load_E.tolist() == pytest.approx([0.25] * 4)
        one_sided_BTD = 50 * fair_BTD[:, :1].expand(-1, 4, -1)
        assert moe(one_sided_BTD)[1].load_balance_loss.item() == pytest.approx(4)


@for_both_products
def test_a_model_in_bf16_autocast_is_close_to_itself_in_float64(config):
    model, tokens = random_model(config), windows(config)
    expected = reference_loss(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = reference_loss(random_model(config).float(), tokens)
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    loss.backward()


def cuda_loss(model, tokens):
    with torch.autocast("cuda", torch.bfloat16):
        out = model(tokens[:, :-1])
        loss = next_token_loss(out, tokens)
    return loss + 0.01 * out.load_balance_loss + 0.001 * out.z_loss


@needs_cuda
@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "plain"])
def test_the_host_never_waits_for_the_gpu(is_fused):
    config = replace(MOE, d_model=64, n_heads=4, d_ff=176)
    model, tokens = SLM(config).cuda(), windows(config).cuda()
    model.fused_kernels = is_fused
    cuda_loss(model, tokens).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda_loss(model, tokens).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@for_both_products
def test_experts_in_bf16_on_cuda_agree_with_float64_on_the_cpu(config):
    expected = value_and_gradients(
        token_by_token, random_experts(config, 0.2), random_inputs(config, 40)
    )
    x_BTD = random_inputs(config, 40, torch.float32).detach().cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        results = value_and_gradients(
            layer_output, random_experts(config, 0.2).float().cuda(), x_BTD
        )
    assert_near([part.cpu() for part in results], expected, 3e-2)


@pytest.mark.parametrize("tokens", [1, 70, 128])
def test_rows_of_zeros_behind_those_of_each_expert_change_nothing(tokens, monkeypatch):
    layer, x_BTD = random_experts(MOE), random_inputs(MOE, tokens)
    expected = value_and_gradients(layer_output, layer, x_BTD)
    rows = []
    monkeypatch.setattr(moe, "is_faster_padded", lambda *_: True)
    monkeypatch.setattr(
        moe, "grouped_linear", lambda x, *rest: rows.append(len(x)) or grouped_linear(x, *rest)
    )
    assert_near(value_and_gradients(layer_output, layer, x_BTD), expected, 1e-13)
    assert all(number % ROW_MULTIPLE == 0 for number in rows)


def test_only_products_that_need_a_kernel_for_every_number_of_rows_are_padded():
    rows = ROW_MULTIPLE * 4
    assert is_faster_padded(torch.zeros(rows, 8, dtype=torch.bfloat16), 4)
    assert not is_faster_padded(torch.zeros(rows - 1, 8, dtype=torch.bfloat16), 4)
    assert not is_faster_padded(torch.zeros(rows, 8), 4)
    assert not is_faster_padded(torch.zeros(rows, 8, dtype=torch.bfloat16, device="meta"), 4)
