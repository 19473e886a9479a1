"""The fused kernels compute what the plain code beside them defines. All of it needs a GPU."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from config import Placement
from models import next_token_loss
from models.moe import MoE
from models.ops import PLAIN, Ops, choose_ops
from models.rope import apply_rope, rope_cos_sin
from tests.helpers.gpu_models import (
    BF16,
    CONFIGS,
    CUDA,
    DENSE,
    MOE,
    ODD_SIZES,
    TRAINING,
    cuda_train_state,
    cuda_windows,
    for_each_config,
    needs_fused_kernels,
)
from tests.helpers.small_models import relative_error
from transfer import deepen
from utils.optim.adamw import TorchAdamW, build_optimizer
from utils.runtime.device import autocast

pytestmark = needs_fused_kernels
FUSED = Ops(is_fused=True)
DENSE_CONFIGS = {name: config for name, config in CONFIGS.items() if not config.num_experts}
DENSE_CONFIGS["odd sizes"] = ODD_SIZES
for_each_shape = pytest.mark.parametrize("batch, length", [(3, 65), (1, 1), (3, 1), (2, 33)])


def loss_on(model, tokens, dtype=BF16):
    with autocast(CUDA, dtype):
        return next_token_loss(model(tokens[:, :-1]), tokens)


def loss_and_gradients(state, tokens, dtype, is_fused):
    """Returns the loss and the gradient of each float32 weight, each computed in its turn."""
    model = state.model().requires_grad_()
    model.fused_kernels = is_fused
    loss = loss_on(model, tokens, dtype)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def working_gradients(optimizer):
    """Returns the gradient of each parameter, taken from the leaf of the working copy in which it
    lies, and drops the leaves' gradients."""
    gradients = {}
    for name, part in optimizer.parts.items():
        grad, copy = part.leaf.grad.float().contiguous(), part.copy
        first = grad.storage_offset() + copy.storage_offset() - part.leaf.storage_offset()
        gradients[name] = grad.as_strided(copy.shape, copy.stride(), first)
    optimizer.model.zero_grad()
    return gradients


def assert_gradients_near(results, targets, tolerance=0.01):
    """Compares gradients, each relative to its own size, but no small one by itself."""
    assert results.keys() == targets.keys()
    min_norm = 1e-3 * max(gradient.norm() for gradient in targets.values())
    for name, target in targets.items():
        assert relative_error(results[name], target, min_norm) < tolerance, name


@pytest.mark.parametrize("config", DENSE_CONFIGS.values(), ids=DENSE_CONFIGS)
@for_each_shape
def test_loss_and_gradients_are_as_near_to_float32_as_those_of_plain_autocast(
    config, batch, length
):
    state, tokens = cuda_train_state(config), cuda_windows(config, batch, length)
    exact_loss, exact = loss_and_gradients(state, tokens, torch.float32, is_fused=False)
    plain_loss, plain = loss_and_gradients(state, tokens, BF16, is_fused=False)
    fused_loss, fused = loss_and_gradients(state, tokens, BF16, is_fused=True)
    assert abs(fused_loss - exact_loss) < 2 * abs(plain_loss - exact_loss) + 0.01
    min_norm = 1e-3 * max(gradient.norm() for gradient in exact.values())
    for name, target in exact.items():
        plain_error = relative_error(plain[name], target, min_norm)
        assert relative_error(fused[name], target, min_norm) < 2 * plain_error + 0.02, name


def test_a_model_is_fused_in_bf16_autocast_alone_and_only_where_it_may_be():
    model = cuda_train_state(MOE).model().requires_grad_()
    tokens = cuda_windows(MOE, 2, 33)[:, :-1]
    assert choose_ops(model) is PLAIN
    with autocast(CUDA, torch.float16):
        assert choose_ops(model) is PLAIN
    with autocast(CUDA, BF16):
        assert choose_ops(model) == model(tokens).ops == FUSED
        model.fused_kernels = False
        assert choose_ops(model) is model(tokens).ops is PLAIN


def test_training_without_fused_kernels_is_torchs_adamw_on_plain_operations():
    training = replace(TRAINING, fused_kernels=False)
    optimizer = build_optimizer(cuda_train_state(MOE), training, BF16)
    assert isinstance(optimizer, TorchAdamW)
    with autocast(CUDA, BF16):
        assert choose_ops(optimizer.model) is PLAIN


@for_each_config
@pytest.mark.parametrize("placement", get_args(Placement))
def test_new_blocks_that_add_nothing_change_no_bit_in_bf16_either(config, placement):
    model, tokens = cuda_train_state(config).model(), cuda_windows(config, 2, 33)[:, :-1]
    with torch.no_grad(), autocast(CUDA, BF16):
        assert torch.equal(deepen(model, 3, placement)(tokens).logits, model(tokens).logits)


def with_clear_choices(layer, x_ND):
    """Returns the tokens whose choice of experts is no matter of rounding."""
    logits_NE = (x_ND.float() @ layer.router.weight.T).sort(-1, descending=True).values
    last_chosen, first_left_out = logits_NE[:, layer.router.top_k - 1 :].T[:2]
    return x_ND[last_chosen - first_left_out > 1e-3]


@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if c.num_experts])
@for_each_shape
@pytest.mark.parametrize("is_one_sided", [False, True], ids=["", "the same experts for all"])
def test_experts_in_bf16_give_what_the_plain_layer_gives_in_float32(
    name, batch, length, is_one_sided
):
    config = CONFIGS[name]
    torch.manual_seed(0)
    layer = MoE(config).to(CUDA)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x = torch.randn(4 * batch * length, config.d_model, device=CUDA).to(BF16)
    x = with_clear_choices(layer, x)[: batch * length].view(batch, length, -1)
    x = x[:1, :1].expand_as(x).contiguous() if is_one_sided else x
    direction = torch.randn(x.shape, device=CUDA)

    def output_routing_gradients(ops, dtype):
        inputs = (x.to(dtype).requires_grad_(), *layer.parameters())
        with autocast(CUDA, dtype):
            y, routing = ops.moe(layer, inputs[0])
        total = (y * direction).sum() + 3 * routing.load_balance_loss + routing.z_loss
        return y, routing, torch.autograd.grad(total, inputs)

    y_exact, exact, exact_gradients = output_routing_gradients(PLAIN, torch.float32)
    y, routing, gradients = output_routing_gradients(FUSED, BF16)
    assert torch.equal(routing.expert_ids_NC.sort(-1).values, exact.expert_ids_NC.sort(-1).values)
    assert_close(routing.load_E, exact.load_E, rtol=1e-6, atol=1e-7)
    assert_close(routing.load_balance_loss, exact.load_balance_loss, rtol=1e-3, atol=1e-4)
    assert_close(routing.z_loss, exact.z_loss, rtol=1e-3, atol=1e-4)
    assert_close(routing.logits_NE, exact.logits_NE, rtol=1e-3, atol=1e-3)
    assert relative_error(y, y_exact) < 0.02
    for gradient, target in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, target, 1e-3 * exact_gradients[0].norm()) < 0.02


@pytest.mark.parametrize("rows", [1, 130, 1270, 2600, 5200])
@pytest.mark.parametrize("width, inner", [(48, 40), (136, 264)])
def test_products_of_sorted_rows_are_those_with_each_experts_own_weights(rows, width, inner):
    """Two experts have no rows, and one has more than a group of tiles; the last block of columns
    is of another size. Rows are few, more, and so many that torch's own product is called."""
    from models.fused.grouped_gemm import gate_up, grouped_gemm, grouped_weight_grads

    generator = torch.Generator(CUDA).manual_seed(rows)
    randn = partial(torch.randn, device=CUDA, generator=generator)
    shares_E = torch.tensor([0.0, 0.85, 0.05, 0.0, 0.1])
    ends_E = (shares_E.cumsum(0) * rows).round().int()
    spans = list(pairwise([0, *ends_E.tolist()]))
    x, h = randn(rows, width).to(BF16), randn(rows, inner).to(BF16)
    packed, down = randn(5, 2 * inner, width).to(BF16), randn(5, width, inner).to(BF16)
    weight_M, ends_E = randn(rows).abs(), ends_E.to(CUDA)

    def expert_by_expert(a, b):
        products = [a[i:j].float() @ b[e].float() for e, (i, j) in enumerate(spans)]
        return torch.cat(products)

    gate_up_MF, h_MF = gate_up(x, packed, weight_M, ends_E)
    expected = expert_by_expert(x, packed.mT)
    gate, up = expected.chunk(2, -1)
    assert relative_error(gate_up_MF, expected) < 0.01
    assert relative_error(h_MF, F.silu(gate) * up * weight_M[:, None]) < 0.01
    product = grouped_gemm(h, down, ends_E, transposed=True)
    assert relative_error(product, expert_by_expert(h, down.mT)) < 0.01
    assert relative_error(grouped_gemm(x, down, ends_E), expert_by_expert(x, down)) < 0.01
    gradients = torch.stack([x[i:j].float().T @ h[i:j].float() for i, j in spans])
    assert relative_error(grouped_weight_grads(x, h, ends_E), gradients) < 0.01


@pytest.mark.parametrize("length", [1, 64, 65, 300, 1024])
@pytest.mark.parametrize("heads, kv_heads, size", [(6, 2, 16), (1, 1, 32), (4, 1, 64)])
@pytest.mark.parametrize("is_rotated", [True, False], ids=["rope", ""])
def test_attention_of_short_contexts_is_torchs_of_rotated_heads(
    length, heads, kv_heads, size, is_rotated
):
    from models.fused.attention import Attend

    torch.manual_seed(0)
    config = replace(DENSE, n_heads=heads, n_kv_heads=kv_heads, head_dim=size)
    packed = torch.randn(3, length, (heads + 2 * kv_heads) * size, device=CUDA).to(BF16)
    exact = packed.double().requires_grad_()
    direction = torch.randn(3, length, heads * size, device=CUDA).to(BF16)
    positions = torch.arange(length, device=CUDA)
    cos_sin = rope_cos_sin(positions, config, packed) if is_rotated else None

    def plain_attention(packed_BTW):
        parts = packed_BTW.unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = parts.split([heads, kv_heads, kv_heads], 1)
        if cos_sin is not None:
            q, k = (apply_rope(x, *(angle.double() for angle in cos_sin)) for x in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    result = Attend.apply(packed.requires_grad_(), cos_sin, heads, kv_heads)
    expected = plain_attention(exact)
    assert relative_error(result, expected) < 0.01
    (gradient,) = torch.autograd.grad(result, packed, direction)
    (target,) = torch.autograd.grad(expected, exact, direction)
    assert relative_error(gradient, target) < 0.02


@for_each_config
@pytest.mark.parametrize("length", [33, 1100])
def test_gradients_computed_together_are_those_computed_one_by_one(config, length):
    """Contexts are long and heads wide in some cases, where attention takes no part in it."""
    config = replace(config, seq_len=1100)
    state, tokens = cuda_train_state(config), cuda_windows(config, 2, length)
    state.weights = {name: weight.bfloat16().float() for name, weight in state.weights.items()}
    _, one_by_one = loss_and_gradients(state, tokens, BF16, is_fused=True)
    optimizer = build_optimizer(state, TRAINING, BF16)
    with autocast(CUDA, BF16):
        assert choose_ops(optimizer.model).deferred is not None
        with torch.no_grad():
            assert choose_ops(optimizer.model).deferred is None
    loss_on(optimizer.model, tokens).backward()
    assert_gradients_near(working_gradients(optimizer), one_by_one)


@for_each_config
@pytest.mark.parametrize("is_one_backward", [True, False], ids=["one backward", "in reverse"])
def test_each_forward_pass_keeps_its_own_deferred_gradients(config, is_one_backward):
    optimizer = build_optimizer(cuda_train_state(config), TRAINING, BF16)
    first, second = cuda_windows(config, 2, 33, seed=1), cuda_windows(config, 1, 65, seed=2)
    alone = []
    for tokens in (first, second):
        loss_on(optimizer.model, tokens).backward()
        alone.append(working_gradients(optimizer))
    losses = [loss_on(optimizer.model, tokens) for tokens in (first, second)]
    if is_one_backward:
        sum(losses).backward()
    else:
        for loss in reversed(losses):
            loss.backward()
    sums = {name: gradient + alone[1][name] for name, gradient in alone[0].items()}
    assert_gradients_near(working_gradients(optimizer), sums)


def test_a_second_backward_pass_is_an_error_where_gradients_are_deferred():
    optimizer = build_optimizer(cuda_train_state(DENSE), TRAINING, BF16)
    loss = loss_on(optimizer.model, cuda_windows(DENSE, 2, 33))
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError, match="tables"):
        loss.backward()


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_gradients_of_a_token_meet_in_its_row_of_the_table(is_tied):
    from models.fused.embedding import Embedding

    torch.manual_seed(0)
    tokens = torch.randint(7, (3, 50), device=CUDA)
    table = torch.randn(11, 48, device=CUDA, dtype=BF16, requires_grad=True)
    x, head = Embedding.apply(tokens, table)
    assert torch.equal(x, table.detach()[tokens])
    x_grad, head_grad = torch.randn_like(x), torch.randn_like(head)
    outputs = (x, head) if is_tied else (x,)
    output_grads = (x_grad, head_grad.clone()) if is_tied else (x_grad,)
    (gradient,) = torch.autograd.grad(outputs, table, output_grads)
    from_head = head_grad.float() if is_tied else torch.zeros_like(head, dtype=torch.float32)
    expected = from_head.index_add(0, tokens.flatten(), x_grad.flatten(0, 1).float())
    assert relative_error(gradient, expected) < 0.01


@pytest.mark.parametrize("vocab_size", [5, 97, 4096, 4097, 50_257])
@pytest.mark.parametrize("rows", [1, 130])
def test_the_heads_loss_and_gradients_are_those_of_cross_entropy(vocab_size, rows):
    from models.fused.cross_entropy import FusedHeadLoss

    torch.manual_seed(0)
    x = torch.randn(rows, 64, device=CUDA, dtype=BF16, requires_grad=True)
    head = torch.randn(vocab_size, 64, device=CUDA, dtype=BF16, requires_grad=True)
    target = torch.randint(vocab_size, (rows,), device=CUDA)
    loss = FusedHeadLoss.apply(x, head, target, vocab_size, True)
    gradients = torch.autograd.grad(3 * loss, (x, head))
    expected = F.cross_entropy(x.float() @ head.float().T, target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    exact_gradients = torch.autograd.grad(3 * expected, (x, head))
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact) < 0.02
