"""Chooses, once per operation, between its plain definition and a Triton kernel.

The plain definitions are here where they take a line, in models/model.py, models/moe.py and
models/loss.py where they are more. The kernels in models/fused are imported only where they are
used: torch comes without Triton where it comes without CUDA.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from models.cpu_attention import attend_on_cpu, is_faster_on_cpu
from models.kv_cache import LayerKV
from models.loss import CrossEntropy
from models.precision import autocast_to

if TYPE_CHECKING:
    from models.fused.deferred_grads import DeferredWeights
    from models.model import MLP, SLM, Attention
    from models.moe import MoE, Routing

Rope = tuple[Tensor, Tensor]
"""Cosine and sine of the rotation angles: (T, K) for a batch, or (B, 1, T, K) for each text."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def supports_fused_kernels(config: ModelConfig) -> bool:
    """Whether the kernels can compute a model of this shape: those of experts read rows and columns
    of whole 16 bytes."""
    return not config.num_experts or config.d_model % 8 == config.d_ff % 8 == 0


def fused_kernels_available(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can compute this model's products in `dtype` on `device`."""
    is_bf16_cuda = device.type == "cuda" and dtype == torch.bfloat16
    return is_bf16_cuda and has_triton() and supports_fused_kernels(config)


@dataclass(frozen=True)
class Ops:
    """The operations of one forward pass, plain or fused."""

    is_fused: bool = False
    """Use the Triton kernels where they serve."""
    deferred: "DeferredWeights | None" = None
    """Where the gradients of all blocks' weights are gathered, to be computed together at the end
    of the backward pass. None computes each in its turn."""

    def embed(
        self, embedding: nn.Embedding, tokens_BT: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Returns the tokens' embeddings (B, T, D), in `dtype` where plain, and the table (V, D) to
        use as a tied head."""
        if self.is_fused:
            from models.fused.embedding import Embedding

            return Embedding.apply(tokens_BT, embedding.weight)
        return embedding(tokens_BT).to(dtype), embedding.weight

    def add_norm(
        self, x_BTD: Tensor, delta_BTD: Tensor | None, norm: nn.RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """Returns `x + delta` (`x` if delta is None) and the norm of that, both (B, T, D)."""
        if self.is_fused:
            from models.fused.add_norm import fused_add_norm

            return fused_add_norm(x_BTD, delta_BTD, norm, self.deferred)
        x_BTD = x_BTD if delta_BTD is None else x_BTD + delta_BTD
        return x_BTD, norm(x_BTD)

    def attention(
        self, layer: "Attention", x_BTD: Tensor, rope: Rope | None, layer_kv: LayerKV | None = None
    ) -> Tensor:
        """Returns the causal self-attention of `x` (B, T, D)."""
        x_BTD = autocast_to(x_BTD)
        if self.is_fused and layer_kv is None:
            from models.fused.attention import fused_attention, is_faster

            if is_faster(x_BTD.shape[1], layer.head_dim):
                return fused_attention(layer, x_BTD, rope, self.deferred)
        return layer(x_BTD, rope, layer_kv, self)

    def project_qkv(
        self, layer: "Attention", x_BTD: Tensor, rope: Rope | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries (B, H, T, K) and keys, and values (B, G, T, K)."""
        has_one_table = rope is None or rope[0].dim() == 2
        if self.is_fused and has_one_table:
            from models.fused.rope import fused_project_qkv

            return fused_project_qkv(layer, x_BTD, rope)
        return layer.project_qkv(x_BTD, rope)

    def attend(
        self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_B1TS: Tensor | None = None
    ) -> Tensor:
        """Returns softmax(q k / sqrt(K)) v, (B, H, T, K), causal unless a mask is given."""
        if mask_B1TS is None and is_faster_on_cpu(q_BHTK):
            return attend_on_cpu(q_BHTK, k_BGSK, v_BGSK)
        return F.scaled_dot_product_attention(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            attn_mask=mask_B1TS,
            is_causal=mask_B1TS is None,
            enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
        )

    def mlp(self, layer: "MLP", x_BTD: Tensor) -> Tensor:
        """Returns the feed-forward of `x` (B, T, D)."""
        x_BTD = autocast_to(x_BTD)
        if self.is_fused:
            from models.fused.swiglu import fused_mlp

            return fused_mlp(layer, x_BTD, self.deferred)
        return layer(x_BTD)

    def moe(self, layer: "MoE", x_BTD: Tensor) -> tuple[Tensor, "Routing"]:
        """Returns the mixture of experts of `x` (B, T, D), and what the router did."""
        if self.is_fused:
            from models.fused.moe import fused_moe

            return fused_moe(layer, x_BTD)
        return layer(x_BTD)

    def head_loss(
        self, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, vocab_size: int
    ) -> Tensor:
        """Returns the mean cross-entropy, in nats, of the head's logits against `target_N`. The
        head may have more than `vocab_size` rows, which then count for nothing."""
        if self.is_fused:
            from models.fused.cross_entropy import FusedHeadLoss

            needs_grad = torch.is_grad_enabled()
            head_VD = autocast_to(head_VD)
            return FusedHeadLoss.apply(hidden_ND, head_VD, target_N, vocab_size, needs_grad)
        return CrossEntropy.apply(F.linear(hidden_ND, trim_head(head_VD, vocab_size)), target_N)


PLAIN = Ops()


def choose_ops(model: "SLM") -> Ops:
    """Returns the operations for the model's next forward pass: fused under autocast to bf16 on
    CUDA, unless `model.fused_kernels` is off."""
    device = model.embed.weight.device
    if not (model.fused_kernels and device.type == "cuda" and torch.is_autocast_enabled("cuda")):
        return PLAIN
    if not fused_kernels_available(model.config, device, torch.get_autocast_dtype("cuda")):
        return PLAIN
    if model.is_packed and torch.is_grad_enabled():
        from models.fused.deferred_grads import deferred_weight_grads

        return Ops(is_fused=True, deferred=deferred_weight_grads(model))
    return Ops(is_fused=True)


def trim_head(head_VD: Tensor, vocab_size: int) -> Tensor:
    """Returns the first `vocab_size` rows of a head that may be padded. A slice that leaves nothing
    out would still cost a gradient of zeros for the whole head."""
    return head_VD[:vocab_size] if len(head_VD) > vocab_size else head_VD
