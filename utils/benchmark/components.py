"""The components of a training step, each as work that can be timed alone."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from models import ModelOutput, next_token_loss
from models.ops import choose_ops
from utils.benchmark.timing import Work
from utils.optim.adamw import Optimizer
from utils.optim.cuda_graph import CapturedStep, is_capturable
from utils.runtime.device import autocast


def make_component_works(
    optimizer: Optimizer, batch_size: int, dtype: torch.dtype
) -> dict[str, Work]:
    """Returns for each of COMPONENTS, on random input: forward and backward of head and loss, of
    every attention and of every feed-forward; and the optimizer's step.

    They become CUDA graphs where the training step can, after as many runs, so that the time to
    launch them does not count. The gradients are those of a layer's own weights, one by one, which
    the training step computes for all blocks together.
    """
    model = optimizer.model
    config, device = model.config, model.embed.weight.device
    tokens_BS = torch.randint(config.vocab_size, (batch_size, config.seq_len + 1), device=device)
    x_BTD = torch.randn(batch_size, config.seq_len, config.d_model, device=device)
    with torch.no_grad(), autocast(device, dtype):  # with gradients, those would be deferred
        ops = choose_ops(model)
        x_BTD = x_BTD.to(dtype) if ops.is_fused else x_BTD  # as the residual stream is
        _, rope = model.add_positions(x_BTD, None)
    x_BTD.requires_grad_()
    head_VD = (model.embed if config.tie_embeddings else model.head).weight
    zero_grads = [(weight, torch.zeros_like(weight)) for weight in model.parameters()]

    def run_head(tokens_BS: Tensor) -> Tensor:
        with autocast(device, dtype):
            output = ModelOutput(x_BTD, head_VD, config.vocab_size, (), ops)
            loss = next_token_loss(output, tokens_BS)
        torch.autograd.grad(loss, (x_BTD, head_VD))
        return loss

    def run_layers(path: str, forward: Callable[..., Tensor], tokens_BS: Tensor) -> Tensor:
        for block in model.blocks:
            layer = block.get_submodule(path)
            with autocast(device, dtype):
                y_BTD = forward(layer)
            torch.autograd.grad(y_BTD, (x_BTD, *layer.parameters()), torch.ones_like(y_BTD))
        return x_BTD  # because a captured step returns a tensor

    def run_optimizer(tokens_BS: Tensor) -> Tensor:
        for weight, zero_grad in zero_grads:
            weight.grad = zero_grad
        return optimizer.step()

    experts = partial(run_layers, "moe", lambda layer: ops.moe(layer, x_BTD)[0])
    mlp = partial(run_layers, "mlp", lambda layer: ops.mlp(layer, x_BTD))
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "head": run_head,
        "attention": partial(run_layers, "attn", lambda layer: ops.attention(layer, x_BTD, rope)),
        "ffn": experts if config.num_experts else mlp,
        "optimizer": run_optimizer,
    }
    if is_capturable(optimizer):
        steps = {name: CapturedStep(step, optimizer) for name, step in steps.items()}
    return {name: partial(step, tokens_BS) for name, step in steps.items()}
