import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import models.loss
from models.loss import CrossEntropy

ROWS_AT_A_TIME = 100
VOCAB_SIZE = 11


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(models.loss, "MAX_FLOAT32_LOGITS", VOCAB_SIZE * ROWS_AT_A_TIME)


def random_logits_and_targets(tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    logits_NV = 3 * torch.randn(tokens, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    target_N = torch.randint(VOCAB_SIZE, (tokens,), generator=generator)
    return logits_NV.to(dtype).requires_grad_(), target_N


def value_and_gradient(function, logits):
    value = function(logits)
    (gradient,) = torch.autograd.grad(3 * value, logits)
    return value.detach(), gradient


@pytest.mark.parametrize(
    "tokens", [1, 5, ROWS_AT_A_TIME, ROWS_AT_A_TIME + 1, 3 * ROWS_AT_A_TIME - 7]
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradient_are_those_of_cross_entropy(tokens, dtype, tolerance):
    logits, target = random_logits_and_targets(tokens, dtype)
    expected = value_and_gradient(lambda x: F.cross_entropy(x, target), logits)
    result = value_and_gradient(lambda x: CrossEntropy.apply(x, target), logits)
    assert_close(result, expected, rtol=tolerance, atol=tolerance / tokens)


def test_bf16_logits_lose_nothing_in_the_loss_and_one_rounding_in_the_gradient():
    logits, target = random_logits_and_targets(ROWS_AT_A_TIME + 100, torch.bfloat16)
    expected = value_and_gradient(lambda x: F.cross_entropy(x.double(), target), logits)
    loss, gradient = value_and_gradient(lambda x: CrossEntropy.apply(x, target), logits)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    assert_close(gradient, expected[1], rtol=2**-7, atol=1e-9)  # rounded again by the factor of 3


def test_columns_cut_off_a_padded_matrix_are_not_read_and_get_no_gradient():
    padded, target = random_logits_and_targets(ROWS_AT_A_TIME + 5, torch.float64)
    loss, gradient = value_and_gradient(lambda x: CrossEntropy.apply(x[:, 2:9], target % 7), padded)
    columns = padded[:, 2:9].detach().clone().requires_grad_()
    expected = value_and_gradient(lambda x: F.cross_entropy(x, target % 7), columns)
    assert_close((loss, gradient[:, 2:9]), expected, rtol=1e-12, atol=1e-15)
    assert not gradient[:, :2].any() and not gradient[:, 9:].any()


def test_logits_stay_as_they_were_and_nothing_is_saved_where_no_gradient_is_wanted():
    logits, target = random_logits_and_targets(50, torch.float32)
    before = logits.detach().clone()
    with_gradient = CrossEntropy.apply(logits, target)
    with torch.no_grad():
        without_gradient = CrossEntropy.apply(logits, target)
    assert with_gradient.requires_grad and not without_gradient.requires_grad
    assert not CrossEntropy.apply(before, target).requires_grad
    assert torch.equal(with_gradient, without_gradient) and torch.equal(logits, before)
