"""A pre-norm decoder: exactly a Llama when dense, exactly a Mixtral with experts.

Tensors carry their shape as a suffix (x_BTD). B batch, T time, D model, H heads, G key/value heads,
K head size, F feed-forward, E experts, V vocabulary, C chosen experts, L layers.
"""

from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from functools import cache, cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig, require
from models import short
from models.cache import Cache, Past
from models.fused import fuses
from models.moe import MoE, Routing
from models.precision import lowered
from models.rotary import rotary, rotate

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
    """The output axes of a parameter and the one its products are summed over, None for tables
    and gains. Raises KeyError for a parameter that AXES does not know."""
    for pattern, dims in AXES.items():
        if fnmatchcase(name, pattern):
            outputs, _, summed = dims.partition("<")
            return tuple(outputs.split()), summed.strip() or None
    raise KeyError(f"no row of AXES matches {name}")


def initialise(name: str, weight: Tensor, n_layers: int, generator: torch.Generator | None = None):
    """GPT-2's law: normal with 0.02, projections onto the residual stream divided by the square
    root of how many there are; gains are one, routers Xavier-uniform."""
    law = partial(nn.init.normal_, std=0.02, generator=generator)
    if name.endswith("norm.weight"):
        law = nn.init.ones_
    elif name.endswith("router.weight"):
        law = partial(nn.init.xavier_uniform_, generator=generator)
    elif "o_proj" in name or "down_proj" in name:
        law = partial(nn.init.normal_, std=0.02 / (2 * n_layers) ** 0.5, generator=generator)
    law(weight)


class Output:
    """What a model makes of tokens (B, T): the logits, and before them what they are made of."""

    def __init__(
        self, hidden_BTD: Tensor, head_VD: Tensor, vocab_size: int, routing: tuple[Routing, ...]
    ):
        self.hidden_BTD, self.head_VD = hidden_BTD, head_VD
        self.vocab_size = vocab_size
        """The head may have more rows than that, for alignment."""
        self.routing = routing
        """One per mixture-of-experts layer; empty when dense."""

    @cached_property
    def logits(self) -> Tensor:
        """(B, T, V), made when first asked for."""
        return F.linear(self.hidden_BTD, self.unpadded)

    def logits_at(self, places: list[int]) -> Tensor:
        """(B, V): those of one place in each row, without making all others."""
        hidden_BD = self.hidden_BTD[range(len(places)), places]
        return F.linear(hidden_BD, self.unpadded)

    @property
    def unpadded(self) -> Tensor:
        """The head (V, D). A slice would cost a gradient of zeros for what it leaves out."""
        padded = len(self.head_VD) > self.vocab_size
        return self.head_VD[: self.vocab_size] if padded else self.head_VD

    @property
    def balance_loss(self) -> Tensor:
        """Mean over layers; zero when dense."""
        return self._mean([layer.balance for layer in self.routing])

    @property
    def z_loss(self) -> Tensor:
        """Mean over layers; zero when dense."""
        return self._mean([layer.z for layer in self.routing])

    def _mean(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean() if values else self.hidden_BTD.new_zeros(())


class SLM(nn.Module):
    """A decoder of `config`'s shape, initialised from torch's global generator. Raises InputError
    where the configuration leaves the vocabulary's size open."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        require(config.vocab_size > 0, "model.vocab_size = 0 stands for the tokenizer's: set it")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.position = nn.Embedding(config.seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                initialise(name, weight, config.n_layers)

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None) -> Output:
        """tokens (B, T) int64 -> logits (B, T, V) and what the routers did. With a `cache` they go
        on from the tokens it holds, and are added to those. Raises ValueError for a text longer
        than seq_len."""
        config, length = self.config, tokens_BT.shape[1]
        end = length if cache is None else max(cache.lengths) + length
        if end > config.seq_len:
            raise ValueError(f"{end} tokens do not fit a context of {config.seq_len}")
        place_BT, pasts = None, [None] * config.n_layers
        if cache is not None:
            place_BT, pasts = cache.extend(length)
        x_BTD, table_VD = self.looked_up(tokens_BT)
        x_BTD, rotation = self.placed(x_BTD, place_BT)
        delta_BTD, routing = None, []
        with self.together():
            for block, past in zip(self.blocks, pasts, strict=True):
                x_BTD, delta_BTD, layer = block(x_BTD, delta_BTD, rotation, past)
                if layer is not None:
                    routing.append(layer)
            _, x_BTD = add_norm(x_BTD, delta_BTD, self.norm)
        if config.logit_scale != 1:
            x_BTD = x_BTD * config.logit_scale
        head_VD = table_VD if config.tied else self.head.weight
        return Output(x_BTD, head_VD, config.vocab_size, tuple(routing))

    def together(self) -> AbstractContextManager[None]:
        """In training from a bf16 copy (utils/masters.py) the gradients of all blocks' weights are
        made together."""
        is_copy = self.blocks[0].get_submodule("attn").packed is not None
        if is_copy and torch.is_grad_enabled() and fuses(self.embed.weight):
            from models.fused.late import together

            return together(self)
        return nullcontext()

    def looked_up(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens' embeddings (B, T, D), and the table they are from."""
        table_VD = self.embed.weight
        if fuses(table_VD):
            from models.fused.embed import Embed

            return Embed.apply(tokens_BT, table_VD)
        return self.embed(tokens_BT).to(self.norm.weight.dtype), table_VD

    def placed(
        self, x_BTD: Tensor, place_BT: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Embeddings (B, T, D), with their positions added or beside their rotary angles. They
        stand where `place_BT` says, or from 0 on."""
        length = x_BTD.shape[1]
        if self.config.position == "learned":
            table = self.position.weight
            return x_BTD + (table[:length] if place_BT is None else table[place_BT]), None
        if place_BT is None:
            place = torch.arange(length, device=x_BTD.device, dtype=torch.float32)
        else:
            place = place_BT[:, None]  # alike for all heads
        return x_BTD, rotary(place, self.config, x_BTD)


def add_norm(x_BTD: Tensor, delta_BTD: Tensor | None, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """The residual stream with what is to be added to it, and the norm of that."""
    if fuses(x_BTD):
        from models.fused.norm import fused_add_norm

        return fused_add_norm(x_BTD, delta_BTD, norm)
    x_BTD = x_BTD if delta_BTD is None else x_BTD + delta_BTD
    return x_BTD, norm(x_BTD)


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
        rotation: tuple[Tensor, Tensor] | None,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """Hands on the residual stream (B, T, D), and apart from it what is still to be added to
        it; then what the router did, None without one."""
        x_BTD, h_BTD = add_norm(x_BTD, delta_BTD, self.attn_norm)
        x_BTD, h_BTD = add_norm(x_BTD, self.attn(h_BTD, rotation, past), self.ffn_norm)
        if self.is_moe:
            return x_BTD, *self.moe(h_BTD)
        return x_BTD, self.mlp(h_BTD), None


class Attention(nn.Module):
    """Causal; `kv_heads` key/value heads serve `n_heads` query heads in groups, in order."""

    PACKED: tuple[str, ...] = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    packed: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.n_heads, self.kv_heads = (
            config.head_size,
            config.n_heads,
            config.kv_heads,
        )
        heads, kv_heads = config.n_heads * self.head_dim, config.kv_heads * self.head_dim
        # Apart, not packed into one: a packed matrix would tile into q k v q k v.
        self.q_proj = nn.Linear(config.d_model, heads, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.d_model, bias=False)
        self.register_parameter("packed", None)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        past: Past | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D): each token of what it, and what came before it, holds."""
        x_BTD = lowered(x_BTD)
        if fuses(x_BTD) and past is None:
            from models.fused.attention import attend, serves

            if serves(x_BTD.shape[1], self.head_dim):
                return attend(self, x_BTD, rotation)
        q_BHTK, k_BGTK, v_BGTK = self.project(x_BTD, rotation)
        if past is not None:
            k_BGTK, v_BGTK = past.extended(k_BGTK, v_BGTK)
        if past is None and short.serves(q_BHTK):
            y_BHTK = short.attend(q_BHTK, k_BGTK, v_BGTK)
        else:
            y_BHTK = F.scaled_dot_product_attention(
                q_BHTK,
                k_BGTK,
                v_BGTK,
                attn_mask=None if past is None else past.seen_B1TS,
                is_causal=past is None,
                enable_gqa=self.kv_heads != self.n_heads,
            )
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))

    def project(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """Queries (B, H, T, K), keys and values (B, G, T, K), turned by their rotary angles."""
        one_table = rotation is None or rotation[0].dim() == 2  # not one for each row of a batch
        if fuses(x_BTD) and one_table:
            from models.fused.turn import project

            return project(self, x_BTD, rotation)
        q_BHTK, k_BGTK, v_BGTK = (
            proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, *rotation), rotate(k_BGTK, *rotation)
        return q_BHTK, k_BGTK, v_BGTK


class MLP(nn.Module):
    """SwiGLU (2002.05202)."""

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
        x_BTD = lowered(x_BTD)
        if fuses(x_BTD):
            from models.fused.swiglu import feed_forward

            return feed_forward(self, x_BTD)
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
