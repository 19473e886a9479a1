"""How fast the device could be, and how long a training step would take at that speed."""

from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from config import ModelConfig
from transfer.plan import param_shapes
from utils.benchmark.timing import time_in_turn
from utils.runtime.device import device_name
from utils.schedule.phases import attention_macs, flops_per_token

COMPONENTS: tuple[str, ...] = ("head", "attention", "ffn", "optimizer")
"""The parts of a training step that are timed alone (utils/benchmark/components.py)."""
BYTES_PER_STEP = 38
"""Memory traffic per parameter in a step all in float32 but the products: Adam reads and writes
weight and moments (24), the gradient is written and read (8), and a bf16 copy of the weight is
written once and read forward and backward (6)."""
BYTES_PER_PASS = 8
"""What forward and backward move of that: the copy is read twice, the gradient written."""
CALLS_PER_REPEAT = 10
"""Products or copies to each repeat: a single one is over before the clocks have settled."""


NOMINAL_BF16_FLOPS: dict[str, float] = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}
"""For each card, by the name that CUDA gives it, the floating-point operations a second in bf16
that its data sheet promises, without sparsity and with sums in float32. A part of a card (MIG) has
another name."""


def nominal_flops(card: str, dtype: torch.dtype) -> float | None:
    """Returns the data sheet's operations a second in products of `dtype`; None where this project
    does not know it."""
    return NOMINAL_BF16_FLOPS.get(card) if dtype == torch.bfloat16 else None


class DeviceRates(NamedTuple):
    """What the device does at best."""

    flops_per_s: float
    """Floating-point operations in large matrix products, in the training step's precision,
    measured."""
    bytes_per_s: float
    """Bytes of a large copy, what is read and what is written, measured."""
    nominal_flops_per_s: float | None = None
    """What the data sheet promises in place of `flops_per_s`; None where it is not known."""

    @classmethod
    def measure(
        cls, device: torch.device, dtype: torch.dtype, repeats: int, warm_up: int
    ) -> "DeviceRates":
        """Measures a device with products in `dtype`. A CPU gets up to speed on smaller tensors
        than a GPU."""
        size, numbers = (1024, 1 << 24) if device.type == "cpu" else (8192, 1 << 28)
        a, b, product = torch.randn(3, size, size, device=device).to(dtype)
        source, target = torch.randn(2, numbers, device=device)
        counts = CALLS_PER_REPEAT * repeats, CALLS_PER_REPEAT * warm_up
        (product_s,) = time_in_turn([partial(torch.mm, a, b, out=product)], device, *counts)
        (copy_s,) = time_in_turn([partial(target.copy_, source)], device, *counts)
        return cls(
            flops_per_s=2 * size**3 / median(product_s),
            bytes_per_s=2 * source.nbytes / median(copy_s),
            nominal_flops_per_s=nominal_flops(device_name(device), dtype),
        )

    def utilization(self, flops_per_s: float) -> dict[str, float | None]:
        """Returns what share so many of the model's operations a second are: `mfu`, of the nominal
        rate (model FLOPs utilization, arXiv:2204.02311, appendix B), None where that is not known;
        and `of_matrix_rate`, of the measured rate of large products, which no card's nominal rate
        is."""
        nominal = self.nominal_flops_per_s
        return {
            "mfu": None if nominal is None else flops_per_s / nominal,
            "of_matrix_rate": flops_per_s / self.flops_per_s,
        }

    def step_limit_s(self, config: ModelConfig, tokens: int) -> float:
        """Returns the seconds of a step on so many tokens: its products, then its memory traffic,
        at these rates."""
        products_s = tokens * flops_per_token(config) / self.flops_per_s
        return products_s + BYTES_PER_STEP * config.num_params / self.bytes_per_s

    def component_limits_s(self, config: ModelConfig, tokens: int) -> dict[str, float]:
        """Returns the same for each of COMPONENTS. Each has its products and the traffic of its
        weights in forward and backward; the optimizer has all other traffic."""
        head = "embed.weight" if config.tie_embeddings else "head.weight"
        paths = {head: "head", ".attn.": "attention", ".mlp.": "ffn", ".moe.": "ffn"}
        flops, moved = dict.fromkeys(COMPONENTS, 0.0), dict.fromkeys(COMPONENTS, 0.0)
        for name, shape in param_shapes(config).items():
            # A token passes through top_k of the experts, whose weights are stacked.
            visited = config.top_k / config.num_experts if len(shape) == 3 else 1
            for component in (part for path, part in paths.items() if path in name):
                flops[component] += 6 * tokens * visited * shape.numel()
                moved[component] += BYTES_PER_PASS * shape.numel()
        flops["attention"] += 6 * tokens * attention_macs(config)
        moved["optimizer"] = BYTES_PER_STEP * config.num_params - sum(moved.values())
        return {
            part: flops[part] / self.flops_per_s + moved[part] / self.bytes_per_s
            for part in COMPONENTS
        }
