from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small import MOE, next_token_loss, trained_like, windows
from torch.autograd import grad

from models import SLM, fused
from models.model import MLP
from models.moe import MoE, has_grouped_mm

WIDE = replace(MOE, d_model=48, n_heads=6, d_ff=16)
"""Rows of whole 16 bytes in float32 and in bfloat16, so the grouped kernel takes them."""
ODD = replace(MOE, d_model=12, d_ff=10)
"""Rows that it does not take."""
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_fused_kernels_are_not_asked_for_experts_of_odd_sizes():
    odd = replace(WIDE, d_ff=1365)
    assert fused.serves(WIDE) and not fused.serves(ODD) and not fused.serves(odd)
    assert fused.serves(replace(odd, num_experts=0))


def experts(config, scale=0.5):
    torch.manual_seed(0)
    moe = MoE(config).double()
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=scale)
    return moe


def states(config, tokens, dtype=torch.double):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, tokens, config.d_model, generator=generator, dtype=torch.double)
    return x.to(dtype).requires_grad_()


def by_hand(moe, x_BTD):
    """Token by token, expert by expert."""
    y_ND = []
    for x_D in x_BTD.flatten(0, 1):
        best = (moe.router.weight @ x_D).topk(moe.router.top_k)
        y_D = torch.zeros_like(x_D)
        for gate, e in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
            h_F = F.silu(moe.gate_proj[e] @ x_D) * (moe.up_proj[e] @ x_D)
            y_D = y_D + gate * (moe.down_proj[e] @ h_F)
        y_ND.append(y_D)
    return torch.stack(y_ND).view_as(x_BTD)


def output(moe, x_BTD):
    return moe(x_BTD)[0]


def value_and_slopes(function, moe, x_BTD):
    y_BTD = function(moe, x_BTD)
    slopes = grad(y_BTD.double().sin().sum(), [x_BTD, *moe.parameters()])
    return y_BTD, *slopes


def assert_near(got, want, tolerance):
    """Relative to the largest entry of each tensor."""
    for one, other in zip(got, want, strict=True):
        size = other.abs().max().clamp_min(1e-9)
        torch.testing.assert_close(one.double() / size, other / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 40])
def test_every_token_gets_the_gated_sum_of_its_experts(tokens, top_k):
    moe, x_BTD = experts(replace(MOE, top_k=top_k)), states(MOE, tokens)
    want = value_and_slopes(by_hand, moe, x_BTD)
    assert_near(value_and_slopes(output, moe, x_BTD), want, 1e-12)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("config", [WIDE, ODD], ids=["grouped", "looped"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_grouped_kernel_and_the_loop_agree_with_float64(config, tokens, dtype, tolerance):
    moe = experts(config, 0.2)
    want = value_and_slopes(by_hand, moe, states(config, tokens))
    assert has_grouped_mm(moe.gate_proj.to(dtype)) == (config is WIDE)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = value_and_slopes(output, moe.float(), states(config, tokens, torch.float32))
    assert_near(got, want, tolerance)


@pytest.mark.parametrize("config", [MOE, WIDE, ODD])
def test_experts_that_get_no_token_get_no_gradient(config):
    moe, x_BTD = experts(config).float(), states(config, 1, torch.float32)
    y_BTD, routing = moe(x_BTD)
    idle = routing.load_E == 0
    assert idle.sum() == config.num_experts - config.top_k
    for slope in grad(y_BTD.sum(), [moe.gate_proj, moe.up_proj, moe.down_proj]):
        assert (slope[idle] == 0).all() and (slope[~idle] != 0).any()


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_experts_that_are_alike_are_the_dense_layer_whatever_the_router(top_k):
    moe, dense = experts(replace(MOE, top_k=top_k)), MLP(MOE).double()
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            getattr(moe, name.removesuffix(".weight"))[:] = weight
    x_BTD = states(MOE, 40)
    torch.testing.assert_close(moe(x_BTD)[0], dense(x_BTD))


def test_routing_says_which_experts_were_chosen_and_how_often():
    moe, x_BTD = experts(MOE), states(MOE, 40)
    _, routing = moe(x_BTD)
    score_NE = x_BTD.flatten(0, 1) @ moe.router.weight.T
    assert routing.chosen_NC.tolist() == [s.argsort(descending=True)[:2].tolist() for s in score_NE]
    share_E = [(routing.chosen_NC == e).sum() / 80 for e in range(5)]
    torch.testing.assert_close(routing.load_E, torch.tensor(share_E, dtype=torch.double))
    assert routing.load_E.sum().item() == pytest.approx(1)


def test_autocast_does_not_round_the_routers_logits():
    moe, x_BTD = experts(WIDE).float(), states(WIDE, 40, torch.float32)
    want = moe(x_BTD)[1]
    with torch.autocast("cpu", torch.bfloat16):
        got = moe(x_BTD)[1]
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_z_loss_is_the_mean_square_of_the_log_of_the_softmax_denominator():
    moe, x_BTD = experts(MOE), states(MOE, 40)
    denominator_N = (x_BTD.flatten(0, 1) @ moe.router.weight.T).exp().sum(-1)
    torch.testing.assert_close(moe(x_BTD)[1].z, (denominator_N.log() ** 2).mean())


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_is_top_k_where_routing_is_fair_and_grows_to_num_experts(top_k):
    config = replace(MOE, d_model=24, num_experts=4, top_k=top_k)
    moe, fair = experts(config), torch.eye(4, 24, dtype=torch.double)[None]
    with torch.no_grad():
        circle = torch.eye(4, dtype=torch.double) * 2 + torch.eye(4).roll(1, 0)
        moe.router.weight[:, :4] = circle
        assert moe(fair)[1].balance.item() == pytest.approx(top_k)
        assert moe(fair)[1].load_E.tolist() == pytest.approx([0.25] * 4)
        one_sided = 50 * fair[:, :1].expand(-1, 4, -1)
        assert moe(one_sided)[1].balance.item() == pytest.approx(4)


@pytest.mark.parametrize("config", [WIDE, ODD], ids=["grouped", "looped"])
def test_a_model_in_bfloat16_autocast_is_close_to_itself_in_float64(config):
    model, tokens = trained_like(config), windows(config)
    want = next_token_loss(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(trained_like(config).float(), tokens)
    assert loss.item() == pytest.approx(want.item(), rel=0.02)
    loss.backward()


def cuda_loss(model, tokens):
    with torch.autocast("cuda", torch.bfloat16):
        out = model(tokens[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss + 0.01 * out.balance_loss + 0.001 * out.z_loss


@needs_cuda
def test_the_host_never_waits_for_the_gpu():
    config = replace(MOE, d_model=64, n_heads=4, d_ff=176)
    model, tokens = SLM(config).cuda(), windows(config).cuda()
    cuda_loss(model, tokens).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda_loss(model, tokens).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("config", [WIDE, ODD], ids=["grouped", "looped"])
def test_experts_in_bfloat16_on_cuda_agree_with_float64_on_the_cpu(config):
    want = value_and_slopes(by_hand, experts(config, 0.2), states(config, 40))
    x_BTD = states(config, 40, torch.float32).detach().cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        got = value_and_slopes(output, experts(config, 0.2).float().cuda(), x_BTD)
    assert_near([part.cpu() for part in got], want, 3e-2)
