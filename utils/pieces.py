"""The parts of a training step, each as work that can be timed alone."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from models import Output, fused, next_token_loss
from models.precision import lowered
from models.rotary import rotary
from utils.device import autocast
from utils.optimizer import Optimizer


def pieces(
    optimizer: Optimizer, batch_size: int, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """Forward and backward of head and loss, of every attention and of every feed-forward, on
    random input; and the optimizer's step."""
    model = optimizer.model
    config, device = model.config, model.embed.weight.device
    shape_BS = batch_size, config.seq_len + 1
    tokens_BS = torch.randint(config.vocab_size, shape_BS, device=device)
    x_BTD = torch.randn(batch_size, config.seq_len, config.d_model, device=device)
    if fused.available(device, dtype):
        x_BTD = x_BTD.to(dtype)  # as the stream is there
    x_BTD.requires_grad_()
    head_VD = model.embed.weight if config.tied else model.head.weight

    def head() -> None:
        with autocast(device, dtype):
            out = Output(lowered(x_BTD), head_VD, config.vocab_size, ())
            loss = next_token_loss(out, tokens_BS)
        torch.autograd.grad(loss, (x_BTD, head_VD))

    def attention(module: nn.Module) -> Tensor:
        place_T = torch.arange(config.seq_len, device=device)
        rotation = rotary(place_T, config, x_BTD) if config.position == "rope" else None
        return module(lowered(x_BTD), rotation)

    def feed_forward(module: nn.Module) -> Tensor:
        return module(x_BTD)[0] if config.num_experts else module(x_BTD)

    def each(modules: list[nn.Module], call: Callable[[nn.Module], Tensor]) -> None:
        for module in modules:
            with autocast(device, dtype):
                y_BTD = call(module)
            inputs = (x_BTD, *module.parameters())
            torch.autograd.grad(y_BTD, inputs, torch.ones_like(y_BTD))

    weights = list(model.parameters())
    zeros = [torch.zeros_like(weight) for weight in weights]

    def step() -> None:
        for weight, zero in zip(weights, zeros, strict=True):
            weight.grad = zero
        optimizer.step()

    blocks = list(model.blocks)
    inner = "moe" if config.num_experts else "mlp"
    return {
        "head": head,
        "attention": partial(each, [block.get_submodule("attn") for block in blocks], attention),
        "ffn": partial(each, [block.get_submodule(inner) for block in blocks], feed_forward),
        "optimizer": step,
    }
