import torch

from utils.optim.grad_norm import global_norm


def test_the_norm_of_gradients_in_half_precision_is_taken_in_float32():
    torch.manual_seed(0)
    grads = [1e-3 * torch.randn(*shape) for shape in ((7, 300), (5,), (2, 3, 4))]
    expected = torch.cat([grad.bfloat16().double().flatten() for grad in grads]).norm()
    norm = global_norm([grad.bfloat16() for grad in grads])
    torch.testing.assert_close(norm, expected.float())
