import torch

from utils.optim.grad_norm import global_norm


def test_the_norm_of_gradients_in_half_precision_is_taken_in_float32_with_their_weights():
    torch.manual_seed(0)
    grads = [1e-3 * torch.randn(*shape) for shape in ((7, 300), (5,), (2, 3, 4))]
    weights = [1.0, 6.0, 0.5]
    pairs = zip(grads, weights, strict=True)
    squares = [weight * grad.bfloat16().double().square().sum() for grad, weight in pairs]
    norm = global_norm([grad.bfloat16() for grad in grads], weights)
    torch.testing.assert_close(norm, sum(squares).sqrt().float())
