"""A pre-norm decoder: exactly a Llama (arXiv:2302.13971) when dense, exactly a Mixtral
(arXiv:2401.04088) with experts. Norms are RMSNorm (arXiv:1910.07467).

Tensors carry their shape as a suffix (x_BTD). B batch, T time, D model, H heads, G key/value heads,
K head size, F feed-forward, E experts, V vocabulary, C chosen experts, L layers.

Blocks call their operations through `ops` (models/ops.py), which either calls the modules below or
a kernel that computes the same.
"""

from fnmatch import fnmatchcase
from functools import cache, cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig, require
from models.kv_cache import KVCache, LayerKV
from models.moe import MoE, Routing
from models.ops import PLAIN, Ops, Rope, choose_ops, trim_head
from models.rope import apply_rope, rope_cos_sin

MAX_LOGITS = 1 << 25
"""Logits that exist at a time where no gradient is asked for."""

# What each dimension of each parameter is, written "outputs < input". Growth and its tests read
# this table; nothing else needs to know how a tensor is laid out.
AXES = {
    "embed.weight":                "vocab embed",
    "position.weight":             "position embed",
    "blocks.*.attn_norm.weight":   "embed",
    "blocks.*.attn.q_proj.weight": "heads < embed",
    "blocks.*.attn.k_proj.weight": "kv_heads < embed",
    "blocks.*.attn.v_proj.weight": "kv_heads < embed",
    "blocks.*.attn.o_proj.weight": "embed < heads",
    "blocks.*.ffn_norm.weight":    "embed",
    "blocks.*.mlp.gate_proj.weight": "ffn < embed",
    "blocks.*.mlp.up_proj.weight": "ffn < embed",
    "blocks.*.mlp.down_proj.weight": "embed < ffn",
    "blocks.*.moe.router.weight":  "expert < embed",
    "blocks.*.moe.gate_proj":      "expert ffn < embed",
    "blocks.*.moe.up_proj":        "expert ffn < embed",
    "blocks.*.moe.down_proj":      "expert embed < ffn",
    "norm.weight":                 "embed",
    "head.weight":                 "vocab < embed",
}  # fmt: skip


@cache
def axes(name: str) -> tuple[tuple[str, ...], str | None]:
    """Returns the output axes of a parameter, and its input axis: the one that its products sum
    over, None for tables and gains.

    Raises:
        KeyError: for a parameter that AXES does not know.
    """
    for pattern, dims in AXES.items():
        if fnmatchcase(name, pattern):
            outputs, _, input_axis = dims.partition("<")
            return tuple(outputs.split()), input_axis.strip() or None
    raise KeyError(f"no row of AXES matches {name}")


def initialize(name: str, weight: Tensor, n_layers: int, generator: torch.Generator | None = None):
    """Fills a parameter by GPT-2's law: normal with standard deviation 0.02, projections onto the
    residual stream divided by the square root of how many there are. Gains are one, and routers are
    Xavier-uniform."""
    init = partial(nn.init.normal_, std=0.02, generator=generator)
    if name.endswith("norm.weight"):
        init = nn.init.ones_
    elif name.endswith("router.weight"):
        init = partial(nn.init.xavier_uniform_, generator=generator)
    elif "o_proj" in name or "down_proj" in name:
        init = partial(nn.init.normal_, std=0.02 / (2 * n_layers) ** 0.5, generator=generator)
    init(weight)


class ModelOutput:
    """What a model computes from tokens (B, T): logits (B, T, V) on demand, and what the routers
    did."""

    def __init__(
        self,
        hidden_BTD: Tensor,
        head_VD: Tensor,
        vocab_size: int,
        routing: tuple[Routing, ...],
        ops: Ops = PLAIN,
    ):
        self.hidden_BTD, self.head_VD, self.ops = hidden_BTD, head_VD, ops
        self.vocab_size = vocab_size
        """The head may have more rows than that, for alignment."""
        self.routing = routing
        """One Routing per mixture-of-experts layer; empty when dense."""

    @cached_property
    def logits(self) -> Tensor:
        """Logits (B, T, V), computed when first asked for."""
        return F.linear(self.hidden_BTD, trim_head(self.head_VD, self.vocab_size))

    def logits_at(self, positions: list[int]) -> Tensor:
        """Returns the logits (B, V) at one position of each row, without computing the others."""
        hidden_BD = self.hidden_BTD[range(len(positions)), positions]
        return F.linear(hidden_BD, trim_head(self.head_VD, self.vocab_size))

    @property
    def load_balance_loss(self) -> Tensor:
        """Mean over layers; zero when dense."""
        return self._mean([layer.load_balance_loss for layer in self.routing])

    @property
    def z_loss(self) -> Tensor:
        """Mean over layers; zero when dense."""
        return self._mean([layer.z_loss for layer in self.routing])

    def _mean(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean() if values else self.hidden_BTD.new_zeros(())


def next_token_loss(out: ModelOutput, tokens_BS: Tensor) -> Tensor:
    """Returns the mean cross-entropy, in nats, of the model's output for the first T tokens of
    windows (B, T + 1) against the last T."""
    hidden_ND, target_N = out.hidden_BTD.flatten(0, 1), tokens_BS[:, 1:].flatten()
    if torch.is_grad_enabled():
        return out.ops.head_loss(hidden_ND, out.head_VD, target_N, out.vocab_size)
    rows = max(1, MAX_LOGITS // out.vocab_size)
    losses = [
        len(target) / len(target_N) * out.ops.head_loss(hidden, out.head_VD, target, out.vocab_size)
        for hidden, target in zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
    ]
    return torch.stack(losses).sum()


class SLM(nn.Module):
    """A decoder of `config`'s shape, initialised from torch's global generator.

    Raises:
        InputError: if the configuration leaves the size of the vocabulary open.
    """

    fused_kernels = True
    """Whether the forward pass may use Triton kernels, where they are available."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        require(config.vocab_size > 0, "model.vocab_size = 0 stands for the tokenizer's: set it")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.position_embedding == "learned":
            self.position = nn.Embedding(config.seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                initialize(name, weight, config.n_layers)

    @property
    def is_packed(self) -> bool:
        """Whether projections of the same input lie in one weight, as in a working copy."""
        return self.blocks[0].get_submodule("attn").packed is not None

    @property
    def head_VD(self) -> Tensor:
        """The output head's weight: the token embedding's where they are tied."""
        return (self.embed if self.config.tie_embeddings else self.head).weight.data

    def forward(self, tokens_BT: Tensor, kv_cache: KVCache | None = None) -> ModelOutput:
        """Computes the logits of tokens (B, T) int64. With a `kv_cache` the tokens follow those it
        holds, and are added to them.

        Raises:
            ValueError: for a text longer than seq_len.
        """
        config, length = self.config, tokens_BT.shape[1]
        end = length if kv_cache is None else max(kv_cache.lengths) + length
        if end > config.seq_len:
            raise ValueError(f"{end} tokens do not fit a context of {config.seq_len}")
        position_BT, layer_kvs = None, [None] * config.n_layers
        if kv_cache is not None:
            position_BT, layer_kvs = kv_cache.reserve(length)

        ops = choose_ops(self)
        x_BTD, table_VD = ops.embed(self.embed, tokens_BT, self.norm.weight.dtype)
        x_BTD, rope = self.add_positions(x_BTD, position_BT)
        delta_BTD, routing = None, []
        for block, layer_kv in zip(self.blocks, layer_kvs, strict=True):
            x_BTD, delta_BTD, layer_routing = block(x_BTD, delta_BTD, rope, layer_kv, ops)
            if layer_routing is not None:
                routing.append(layer_routing)
        _, hidden_BTD = ops.add_norm(x_BTD, delta_BTD, self.norm)
        if config.logit_scale != 1:
            hidden_BTD = hidden_BTD * config.logit_scale
        head_VD = table_VD if config.tie_embeddings else self.head.weight
        return ModelOutput(hidden_BTD, head_VD, config.vocab_size, tuple(routing), ops)

    def add_positions(
        self, x_BTD: Tensor, position_BT: Tensor | None
    ) -> tuple[Tensor, Rope | None]:
        """Returns embeddings (B, T, D) with learned positions added and None, or as they are with
        the angles of rotary ones. Positions count from 0 unless they are given."""
        length = x_BTD.shape[1]
        if self.config.position_embedding == "learned":
            table = self.position.weight
            return x_BTD + (table[:length] if position_BT is None else table[position_BT]), None
        if position_BT is None:
            position = torch.arange(length, device=x_BTD.device, dtype=torch.float32)
        else:
            position = position_BT[:, None]  # the same for all heads
        return x_BTD, rope_cos_sin(position, self.config, x_BTD)


class Block(nn.Module):
    """Attention, then a feed-forward or a mixture of them, each on the norm of the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if config.num_experts:
            self.moe = MoE(config)
        else:
            self.mlp = MLP(config)
        self.is_moe = config.num_experts > 0

    def forward(
        self,
        x_BTD: Tensor,
        delta_BTD: Tensor | None,
        rope: Rope | None,
        layer_kv: LayerKV | None = None,
        ops: Ops = PLAIN,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """Returns `(x_BTD, delta_BTD, routing)`. `delta_BTD` is this block's output, not yet added,
        so that the next norm can fuse the addition; `routing` is None without experts."""
        x_BTD, h_BTD = ops.add_norm(x_BTD, delta_BTD, self.attn_norm)
        attention_BTD = ops.attention(self.attn, h_BTD, rope, layer_kv)
        x_BTD, h_BTD = ops.add_norm(x_BTD, attention_BTD, self.ffn_norm)
        if self.is_moe:
            return x_BTD, *ops.moe(self.moe, h_BTD)
        return x_BTD, ops.mlp(self.mlp, h_BTD), None


class Attention(nn.Module):
    """Causal self-attention; `kv_heads` key/value heads serve `n_heads` query heads in groups, in
    order (grouped-query attention, arXiv:2305.13245)."""

    PACKED: tuple[str, ...] = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    packed: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.n_heads = config.head_size, config.n_heads
        self.kv_heads = config.kv_heads
        heads, kv_heads = config.n_heads * self.head_dim, config.kv_heads * self.head_dim
        # Separate, not packed into one: a packed matrix would tile into q k v q k v.
        self.q_proj = nn.Linear(config.d_model, heads, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.d_model, bias=False)
        self.register_parameter("packed", None)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None,
        layer_kv: LayerKV | None = None,
        ops: Ops = PLAIN,
    ) -> Tensor:
        """Returns (B, T, D): for each token, a mix of the values of itself and those before it."""
        q_BHTK, k_BGSK, v_BGSK = ops.project_qkv(self, x_BTD, rope)
        mask_B1TS = None
        if layer_kv is not None:
            (k_BGSK, v_BGSK), mask_B1TS = layer_kv.append(k_BGSK, v_BGSK), layer_kv.mask_B1TS
        y_BHTK = ops.attend(q_BHTK, k_BGSK, v_BGSK, mask_B1TS)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))

    def project_qkv(self, x_BTD: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries (B, H, T, K) and keys, and values (B, G, T, K)."""
        q_BHTK, k_BGTK, v_BGTK = (
            proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q_BHTK, k_BGTK = apply_rope(q_BHTK, *rope), apply_rope(k_BGTK, *rope)
        return q_BHTK, k_BGTK, v_BGTK


class MLP(nn.Module):
    """The SwiGLU feed-forward (arXiv:2002.05202)."""

    PACKED: tuple[str, ...] = ("gate_proj.weight", "up_proj.weight")
    packed: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.register_parameter("packed", None)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
