"""What a model computes on the probe batch, in a precision of its own: float64 to judge a growth,
float32 to tell what a user of the model sees. Weights are promoted block by block, autocast is off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import SLM

FORWARD_TOKENS = 2048
"""Tokens of the probe that pass through the blocks at a time, but at least one window."""
LOGIT_TOKENS = 256
"""Tokens whose logits are held at a time."""


class ProbeOutput(NamedTuple):
    """What a model computes on a probe of B windows of T + 1 tokens."""

    hidden_BTD: Tensor
    """What the head reads; where there is no head, the logits (B, T, V)."""
    head_VD: Tensor | None
    loss_BT: Tensor
    expert_ids_BLTC: Tensor
    """Experts of each token in each mixture-of-experts layer, ascending."""
    margin_BLT: Tensor
    """Lead of the last expert that was chosen over the first that was not, in the router's logits;
    infinite where all are chosen."""

    @classmethod
    def from_logits(
        cls, logits_BTV: Tensor, probe_BS: Tensor, router_logits: list[Tensor], top_k: int
    ) -> "ProbeOutput":
        """Returns the output of a model on windows (B, T + 1), given its logits and those (B, T, E)
        of each layer's router."""
        return cls.from_hidden(logits_BTV, None, probe_BS, router_logits, top_k)

    @classmethod
    def from_hidden(
        cls,
        hidden_BTD: Tensor,
        head_VD: Tensor | None,
        probe_BS: Tensor,
        router_logits: list[Tensor],
        top_k: int,
    ) -> "ProbeOutput":
        """Returns the output of a model on windows (B, T + 1), given what its head reads and the
        logits (B, T, E) of each layer's router."""
        batch, length = hidden_BTD.shape[:2]
        ids_BLTC, margin_BLT = choose_experts(router_logits, top_k, probe_BS[:, :-1])
        output = cls(hidden_BTD, head_VD, hidden_BTD, ids_BLTC, margin_BLT)
        targets = probe_BS[:, 1:].flatten().split(LOGIT_TOKENS)
        losses = [
            F.cross_entropy(logits_NV, target_N, reduction="none")
            for logits_NV, target_N in zip(output.logits(), targets, strict=True)
        ]
        return output._replace(loss_BT=torch.cat(losses).view(batch, length))

    def logits(self) -> Iterator[Tensor]:
        """Yields the logits (N, V) of LOGIT_TOKENS tokens at a time, window after window."""
        head_VD = None if self.head_VD is None else self.head_VD.to(self.hidden_BTD.dtype)
        for hidden_ND in self.hidden_BTD.flatten(0, 1).split(LOGIT_TOKENS):
            yield hidden_ND if head_VD is None else F.linear(hidden_ND, head_VD)

    def largest_logit(self) -> float:
        """Returns the largest |logit|; NaN where there is one."""
        return torch.stack([logits_NV.abs().max() for logits_NV in self.logits()]).max().item()

    @classmethod
    def concatenate(cls, outputs: list["ProbeOutput"]) -> "ProbeOutput":
        """Returns the outputs of one model on several windows as one."""
        hidden, _, *others = zip(*outputs, strict=True)
        rest = (torch.cat(parts) for parts in others)
        return cls(torch.cat(hidden), outputs[0].head_VD, *rest)

    def first_window(self) -> "ProbeOutput":
        """Returns the output on the first of the windows."""
        return self._replace(
            hidden_BTD=self.hidden_BTD[:1],
            loss_BT=self.loss_BT[:1],
            expert_ids_BLTC=self.expert_ids_BLTC[:1],
            margin_BLT=self.margin_BLT[:1],
        )

    def without_routing(self) -> "ProbeOutput":
        """Returns the output as that of a dense model."""
        ids_BLTC, margin_BLT = self.expert_ids_BLTC[:, :0], self.margin_BLT[:, :0]
        return self._replace(expert_ids_BLTC=ids_BLTC, margin_BLT=margin_BLT)

    def to(self, device: torch.device) -> "ProbeOutput":
        """Returns the output on `device`."""
        parts = {name: part for name, part in self._asdict().items() if part is not None}
        return self._replace(**{name: part.to(device) for name, part in parts.items()})


def choose_experts(
    router_logits: list[Tensor], top_k: int, tokens_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the experts (B, L, T, C) that logits (B, T, E) of each layer choose, and the margins
    (B, L, T) by which they are chosen."""
    batch, length = tokens_BT.shape
    if not router_logits:
        return tokens_BT.new_empty(batch, 0, length, 0), tokens_BT.new_empty(batch, 0, length)
    logits_BLTE = torch.stack(router_logits, 1)
    ranked = logits_BLTE.topk(min(top_k + 1, logits_BLTE.shape[-1]))
    ids_BLTC = ranked.indices[..., :top_k].sort(-1).values
    if ranked.values.shape[-1] == top_k:
        return ids_BLTC, torch.full_like(ranked.values[..., 0], torch.inf)
    return ids_BLTC, ranked.values[..., top_k - 1] - ranked.values[..., top_k]


def judging_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype in which a growth is judged: float64, but float32 on MPS, which has no
    other."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Computes float32 products in float32, whatever is set for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def replaced_weights(model: SLM, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Computes with `replace(weight)` in place of each weight, one block at a time."""
    originals: dict[nn.Module, list[Tensor]] = {}

    def put_in(module: nn.Module, *_: object) -> None:
        originals[module] = [weight.data for weight in module.parameters()]
        for weight in module.parameters():
            weight.data = replace(weight.data)

    def put_back(module: nn.Module, *_: object) -> None:
        for weight, data in zip(module.parameters(), originals.pop(module), strict=True):
            weight.data = data

    others = [part for name, part in model.named_children() if name != "blocks"]
    hooks = [block.register_forward_pre_hook(put_in) for block in model.blocks]
    hooks += [block.register_forward_hook(put_back) for block in model.blocks]
    try:
        for part in others:
            put_in(part)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(originals):
            put_back(module)


@torch.no_grad()
def run_probe(
    model: SLM, probe_BS: Tensor, dtype: torch.dtype | None = None, rounding: float = 0.0
) -> ProbeOutput:
    """Returns what `model` computes on windows (B, T + 1).

    Args:
        model: The model; its weights stay as they are.
        probe_BS: Tokens, int64, on the model's device.
        dtype: What to compute in; None takes `judging_dtype`.
        rounding: Largest relative error to give each weight, at random.
    """
    exact = dtype or judging_dtype(probe_BS.device)
    generator = torch.Generator(probe_BS.device).manual_seed(0)

    def promote(weight: Tensor) -> Tensor:
        weight = weight.to(exact)
        if not rounding:
            return weight
        error = torch.empty_like(weight).uniform_(-rounding, rounding, generator=generator)
        return weight.addcmul(weight, error)

    autocast_off = torch.autocast(probe_BS.device.type, enabled=False)
    windows = max(1, FORWARD_TOKENS // (probe_BS.shape[1] - 1))
    with exact_matmul(), replaced_weights(model, promote), autocast_off:
        outputs = [run_windows(model, rows_BS) for rows_BS in probe_BS.split(windows)]
    output = ProbeOutput.concatenate(outputs)
    # The stored head in place of the promoted one: it is there anyway, and smaller.
    return output if rounding else output._replace(head_VD=model.head_VD)


def run_windows(model: SLM, probe_BS: Tensor) -> ProbeOutput:
    """Returns what `model` computes on windows (B, T + 1), all at once."""
    tokens_BT = probe_BS[:, :-1]
    out = model(tokens_BT)
    router_logits = [layer.logits_NE.view(*tokens_BT.shape, -1) for layer in out.routing]
    head_VD, top_k = out.head_VD.detach(), model.config.top_k
    return ProbeOutput.from_hidden(out.hidden_BTD, head_VD, probe_BS, router_logits, top_k)
