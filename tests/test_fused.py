"""The fused kernels compute what the plain code beside them defines. All of it needs a GPU."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from on_gpu import BF16, CONFIGS, CUDA, DENSE, EACH, NEEDS_GPU, ODD, SETTINGS, at_rest, off, windows
from torch.testing import assert_close

from config import Where
from models import SLM, fused, next_token_loss
from models.moe import MoE
from models.rotary import rotary, rotate
from transfer import deepen
from utils.device import autocast
from utils.optimizer import wake

pytestmark = NEEDS_GPU


def gradients(state, tokens, dtype, kernels):
    """The loss and the gradient of each parameter, the model's weights being float32."""
    fused.enabled = kernels
    try:
        model = state.model().requires_grad_()
        with autocast(CUDA, dtype):
            loss = next_token_loss(model(tokens[:, :-1]), tokens)
        loss.backward()
    finally:
        fused.enabled = True
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


SHAPES = pytest.mark.parametrize("batch, length", [(3, 65), (1, 1), (3, 1), (2, 33)])
DENSE_ONES = {name: c for name, c in CONFIGS.items() if not c.num_experts} | {"odd sizes": ODD}


@pytest.mark.parametrize("config", DENSE_ONES.values(), ids=DENSE_ONES)
@SHAPES
def test_loss_and_gradients_are_as_near_to_float32_as_those_of_plain_autocast(
    config, batch, length
):
    state, tokens = at_rest(config), windows(config, batch, length)
    loss, exact = gradients(state, tokens, torch.float32, kernels=False)
    other, plain = gradients(state, tokens, BF16, kernels=False)
    got, slopes = gradients(state, tokens, BF16, kernels=True)
    assert abs(got - loss) < 2 * abs(other - loss) + 0.01
    least = 1e-3 * max(slope.norm() for slope in exact.values())
    for each, want in exact.items():
        assert off(slopes[each], want, least) < 2 * off(plain[each], want, least) + 0.02, each


@EACH
@pytest.mark.parametrize("where", get_args(Where))
def test_new_blocks_that_add_nothing_change_no_bit_in_bf16_either(config, where):
    model, tokens = at_rest(config).model(), windows(config, 2, 33)[:, :-1]
    with torch.no_grad(), autocast(CUDA, BF16):
        assert torch.equal(deepen(model, 3, where)(tokens).logits, model(tokens).logits)


def clear_cut(layer, x_ND):
    """The tokens whose choice of experts is no matter of rounding."""
    ranked = (x_ND.float() @ layer.router.weight.T).sort(-1, descending=True).values
    last, next_best = ranked[:, layer.router.top_k - 1], ranked[:, layer.router.top_k]
    return x_ND[last - next_best > 1e-3]


@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if c.num_experts])
@SHAPES
@pytest.mark.parametrize("alike", [False, True], ids=["", "one expert for all"])
def test_experts_give_what_the_plain_layer_gives_in_float32(name, batch, length, alike):
    """On the same input in bf16."""
    config = CONFIGS[name]
    torch.manual_seed(0)
    layer = MoE(config).to(CUDA)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x = torch.randn(4 * batch * length, config.d_model, device=CUDA).to(BF16)
    x = clear_cut(layer, x)[: batch * length].view(batch, length, -1)
    x = x[:1, :1].expand_as(x).contiguous() if alike else x
    asked = torch.randn(x.shape, device=CUDA)

    def out(dtype):
        inputs = (x.to(dtype).requires_grad_(), *layer.parameters())
        with autocast(CUDA, dtype):
            y, routing = layer(inputs[0])
        total = (y * asked).sum() + 3 * routing.balance + routing.z
        return y, routing, torch.autograd.grad(total, inputs)

    (want, routing, exact), (y, routed, slopes) = out(torch.float32), out(BF16)
    assert torch.equal(routed.chosen_NC.sort(-1).values, routing.chosen_NC.sort(-1).values)
    assert_close(routed.load_E, routing.load_E, rtol=1e-6, atol=1e-7)
    assert_close((routed.balance, routed.z), (routing.balance, routing.z), rtol=1e-3, atol=1e-4)
    assert off(y, want) < 0.02
    for slope, right in zip(slopes, exact, strict=True):
        assert off(slope, right, 1e-3 * exact[0].norm()) < 0.02


@pytest.mark.parametrize("rows", [1, 130, 1270, 2600, 5200])
@pytest.mark.parametrize("width, inner", [(48, 40), (136, 264)])
def test_products_of_sorted_rows_are_those_with_each_experts_own_weights(rows, width, inner):
    """Experts without rows among them, one with more than a group of tiles, and the last block of a
    size of its own; rows are few, more, and so many that torch's product is called."""
    from models.fused.products import gate_up, grouped, grouped_weights

    generator = torch.Generator(CUDA).manual_seed(rows)
    randn = partial(torch.randn, device=CUDA, generator=generator)
    shares = torch.tensor([0.0, 0.85, 0.05, 0.0, 0.1])
    ends = (shares.cumsum(0) * rows).round().int()
    runs = list(pairwise([0, *ends.tolist()]))
    x, h = randn(rows, width).to(BF16), randn(rows, inner).to(BF16)
    packed, down = randn(5, 2 * inner, width).to(BF16), randn(5, width, inner).to(BF16)
    weight, ends = randn(rows).abs(), ends.to(CUDA)

    def each(a, b):
        return torch.cat([a[i:j].float() @ b[e].float() for e, (i, j) in enumerate(runs)])

    both, activated = gate_up(x, packed, weight, ends)
    gate, up = each(x, packed.mT).chunk(2, -1)
    assert off(both, torch.cat([gate, up], -1)) < 0.01
    assert off(activated, F.silu(gate) * up * weight[:, None]) < 0.01
    assert off(grouped(h, down, ends, turned=True), each(h, down.mT)) < 0.01
    assert off(grouped(x, down, ends), each(x, down)) < 0.01
    slopes = torch.stack([x[i:j].float().T @ h[i:j].float() for i, j in runs])
    assert off(grouped_weights(x, h, ends), slopes) < 0.01


@pytest.mark.parametrize("length", [1, 64, 65, 300, 1024])
@pytest.mark.parametrize("heads, kv_heads, size", [(6, 2, 16), (1, 1, 32), (4, 1, 64)])
@pytest.mark.parametrize("turned", [True, False], ids=["rotary", ""])
def test_attention_of_short_contexts_is_torchs_of_turned_heads(
    length, heads, kv_heads, size, turned
):
    from models.fused.attention import Attend

    torch.manual_seed(0)
    config = replace(DENSE, n_heads=heads, n_kv_heads=kv_heads, head_dim=size)
    packed = torch.randn(3, length, (heads + 2 * kv_heads) * size, device=CUDA).to(BF16)
    exact = packed.double().requires_grad_()
    asked = torch.randn(3, length, heads * size, device=CUDA).to(BF16)
    rotation = rotary(torch.arange(length, device=CUDA), config, packed) if turned else None

    def plain(packed_BTW):
        parts = packed_BTW.unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = parts.split([heads, kv_heads, kv_heads], 1)
        if rotation is not None:
            q, k = (rotate(x, *(angle.double() for angle in rotation)) for x in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    got, want = Attend.apply(packed.requires_grad_(), rotation, heads, kv_heads), plain(exact)
    assert off(got, want) < 0.01
    (slope,) = torch.autograd.grad(got, packed, asked)
    (right,) = torch.autograd.grad(want, exact, asked)
    assert off(slope, right) < 0.02


@EACH
@pytest.mark.parametrize("length", [33, 1100])
def test_gradients_made_together_are_those_made_one_by_one(config, length, monkeypatch):
    """Also where attention leaves its products out, in long contexts and for wide heads."""
    config = replace(config, seq_len=1100)
    tokens = windows(config, 2, length)

    def slopes():
        model = wake(at_rest(config), SETTINGS, BF16).model
        with autocast(CUDA, BF16):
            loss = next_token_loss(model(tokens[:, :-1]), tokens)
        loss.backward()
        gains = [block.attn_norm.weight for block in model.blocks]
        memory = {gain.grad.untyped_storage().data_ptr() for gain in gains}
        return {name: p.grad.float() for name, p in model.named_parameters()}, len(memory)

    together, tables = slopes()
    monkeypatch.setattr(SLM, "together", lambda _: nullcontext())
    alone, apart = slopes()
    assert (tables, apart) == (1, 2)
    assert together.keys() == alone.keys()
    least = 1e-3 * max(slope.norm() for slope in alone.values())
    for name, slope in alone.items():
        assert off(together[name], slope, least) < 0.01, name


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradients_of_a_token_meet_in_its_row_of_the_table(tied):
    from models.fused.embed import Embed

    torch.manual_seed(0)
    tokens = torch.randint(7, (3, 50), device=CUDA)
    table = torch.randn(11, 48, device=CUDA, dtype=BF16, requires_grad=True)
    x, head = Embed.apply(tokens, table)
    assert torch.equal(x, table.detach()[tokens])
    slope, of_head = torch.randn_like(x), torch.randn_like(head)
    outputs = ((x, head), (slope, of_head.clone())) if tied else ((x,), (slope,))
    (got,) = torch.autograd.grad(outputs[0], table, outputs[1])
    want = of_head.float() if tied else torch.zeros_like(head, dtype=torch.float32)
    assert off(got, want.index_add(0, tokens.flatten(), slope.flatten(0, 1).float())) < 0.01


@pytest.mark.parametrize("vocab", [5, 97, 4096, 4097, 50_257])
@pytest.mark.parametrize("rows", [1, 130])
def test_the_heads_loss_and_gradients_are_those_of_cross_entropy(vocab, rows):
    from models.fused.cross_entropy import HeadLoss

    torch.manual_seed(0)
    x = torch.randn(rows, 64, device=CUDA, dtype=BF16, requires_grad=True)
    head = torch.randn(vocab, 64, device=CUDA, dtype=BF16, requires_grad=True)
    target = torch.randint(vocab, (rows,), device=CUDA)
    got = HeadLoss.apply(x, head, target, vocab, True)
    slopes = torch.autograd.grad(3 * got, (x, head))
    want = F.cross_entropy(x.float() @ head.float().T, target)
    assert got.item() == pytest.approx(want.item(), rel=1e-2)
    for slope, exact in zip(slopes, torch.autograd.grad(3 * want, (x, head)), strict=True):
        assert off(slope, exact) < 0.02
