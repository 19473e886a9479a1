import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import models.loss
from models import Output, next_token_loss
from models.loss import CrossEntropy

CHUNK = 100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(models.loss, "CHUNK", 11 * CHUNK)


def drawn(tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(tokens, 11, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(11, (tokens,), generator=generator)


def with_gradient(function, logits):
    value = function(logits)
    (gradient,) = torch.autograd.grad(3 * value, logits)
    return value.detach(), gradient


@pytest.mark.parametrize("tokens", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK - 7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradient_are_those_of_cross_entropy(tokens, dtype, tolerance):
    logits, target = drawn(tokens, dtype)
    want = with_gradient(lambda logits: F.cross_entropy(logits, target), logits)
    got = with_gradient(lambda logits: CrossEntropy.apply(logits, target), logits)
    assert_close(got, want, rtol=tolerance, atol=tolerance / tokens)


def test_bf16_logits_lose_nothing_in_the_loss_and_one_rounding_in_the_gradient():
    logits, target = drawn(CHUNK + 100, torch.bfloat16)
    want, slope = with_gradient(lambda logits: F.cross_entropy(logits.double(), target), logits)
    got, gradient = with_gradient(lambda logits: CrossEntropy.apply(logits, target), logits)
    assert got.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert_close(gradient, slope, rtol=2**-7, atol=1e-9)  # rounded again by the factor of 3


def test_the_columns_cut_off_a_padded_matrix_are_not_read_and_get_no_gradient():
    padded, target = drawn(CHUNK + 5, torch.float64)
    value, gradient = with_gradient(lambda x: CrossEntropy.apply(x[:, 2:9], target % 7), padded)
    alone = padded[:, 2:9].detach().clone().requires_grad_()
    want, slope = with_gradient(lambda x: F.cross_entropy(x, target % 7), alone)
    assert_close((value, gradient[:, 2:9]), (want, slope), rtol=1e-12, atol=1e-15)
    assert not gradient[:, :2].any() and not gradient[:, 9:].any()


def test_logits_are_left_as_they_were_and_keep_nothing_where_no_gradient_is_asked():
    logits, target = drawn(50, torch.float32)
    before = logits.detach().clone()
    asked = CrossEntropy.apply(logits, target)
    with torch.no_grad():
        unasked = CrossEntropy.apply(logits, target)
    assert asked.requires_grad and not unasked.requires_grad
    assert not CrossEntropy.apply(before, target).requires_grad
    assert torch.equal(asked, unasked) and torch.equal(logits, before)


def test_each_position_is_held_to_the_token_after_it():
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    sure = 50.0 * F.one_hot(tokens[:, 1:], 5)
    assert next_token_loss(saying(sure), tokens) < 1e-6
    assert next_token_loss(saying(sure.roll(1, -1)), tokens) == pytest.approx(50)


def saying(logits):
    """The output of a model with such logits."""
    return Output(logits, torch.eye(5), 5, ())
