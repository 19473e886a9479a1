"""What a run is, as data: its phases, the model, how it is trained, and on which text.

A preset is a function that returns a complete `Run`, every field of which is an option of train.py,
those of its `phases` included where it has any. Every function here that is annotated `-> Run` is
one. Presets and the default schedule come first; the classes they are made of follow.
"""

from __future__ import annotations  # so that presets can stand before the classes they return

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType, NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)


def full() -> Run:
    """64 M dense -> 246 M mixture of experts -> 932 M twice as wide -> 1.15 B deeper. One GPU."""
    return Run()


def tiny() -> Run:
    """All four phases in under a minute on a laptop's CPU, on the built-in stories."""
    model = ModelConfig(vocab_size=0, d_model=64, n_layers=3, n_heads=2, d_ff=176, seq_len=128)
    training = TrainingConfig(
        steps_phase1=240,
        steps_phase2=80,
        steps_phase3=40,
        steps_phase4=30,
        lr_phase1=5e-3,
        lr_phase2=4e-3,
        lr_phase3=3e-3,
        lr_phase4=2e-3,
        batch_size=8,
        batch_size_phase3=8,
        batch_size_phase4=8,
        upcycle=Upcycle(num_experts=4),
        deepen=Deepen(extra_layers=1),
        eval_every=40,
        eval_tokens=4_096,
        final_eval_tokens=16_384,
        sample_tokens=60,
    )
    data = DataConfig(source="builtin", builtin_stories=8_000)
    return replace(full(), model=model, training=training, data=data)


def single() -> Run:
    """One phase without growth: a model from scratch, or more steps for the one that init_from
    names."""
    return replace(full(), phases={"single": Phase()})


def grow_moe() -> Run:
    """The full schedule without upcycling: a mixture of experts, from scratch or the one that
    init_from names, then twice as wide, then deeper."""
    phases = four_phases(TrainingConfig())
    del phases["dense"]
    phases["moe"] = replace(phases["moe"], growth=None, init_checkpoint="")
    return replace(full(), model=ModelConfig(num_experts=8), phases=phases)


def four_phases(training: TrainingConfig) -> dict[str, Phase]:
    """The default schedule: dense, mixture of experts, wider, deeper. Each phase says how the model
    of the phase before grows into its own."""
    return {
        "dense": Phase(
            steps=training.steps_phase1,
            batch_size=training.batch_size,
            lr=training.lr_phase1,
            checkpoint="dense_model.pt",
        ),
        "moe": Phase(
            growth=training.upcycle,
            steps=training.steps_phase2,
            batch_size=training.batch_size,
            lr=training.lr_phase2,
            checkpoint="moe_model_final.pt",
            init_checkpoint="moe_model_init.pt",
        ),
        "wide": Phase(
            growth=training.widen,
            steps=training.steps_phase3,
            batch_size=training.batch_size_phase3,
            lr=training.lr_phase3,
            checkpoint="medium_moe_final.pt",
        ),
        "deep": Phase(
            growth=training.deepen,
            steps=training.steps_phase4,
            batch_size=training.batch_size_phase4,
            lr=training.lr_phase4,
            checkpoint="large_moe_final.pt",
        ),
    }


class InputError(ValueError):
    """Something the user asked for cannot be done. The message names the field and the value."""


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition`, about a user's value, is true."""
    if not condition:
        raise InputError(message)


class Range(NamedTuple):
    """The numbers that a field may hold, declared beside it: `Annotated[int, Range(1)]`."""

    low: float
    high: float = sys.float_info.max
    exclude: tuple[float, ...] = ()
    """Which of the two ends do not belong to the range."""

    def __contains__(self, value: Any) -> bool:
        return self.low <= value <= self.high and value not in self.exclude

    def __str__(self) -> str:
        low = f"{'above' if self.low in self.exclude else 'at least'} {self.low}"
        high = f" and {'below' if self.high in self.exclude else 'at most'} {self.high}"
        return low + (high if self.high < sys.float_info.max else "")


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, exclude=(0,))]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, exclude=(1,))]
Seed = Annotated[int, Range(0, 2**63 - 1)]
UNIONS = (Union, UnionType)
TYPE_NAMES = {
    NoneType: "None",
    bool: "True or False",
    dict: "a dictionary",
    float: "a finite number",
    int: "a whole number",
    Path: "a path (pathlib.Path)",
    str: "text",
}


@cache
def field_types(kind: type) -> dict[str, tuple[Any, ...]]:
    """For each field of a dataclass, the types (with their Range) that it is declared to take."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        f.name: get_args(hint) if get_origin(hint := hints[f.name]) in UNIONS else (hint,)
        for f in fields(kind)
    }


def accepts(hint: Any, value: Any) -> bool:
    """Whether `value` is of the declared type, one of its choices, and in its range."""
    if get_origin(hint) is Annotated:
        base, allowed = get_args(hint)
        return accepts(base, value) and value in allowed
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def describe_type(hint: Any) -> str:
    """A declared type, as an error message names it."""
    if get_origin(hint) is Annotated:
        base, allowed = get_args(hint)
        return f"{TYPE_NAMES[base]}, {allowed}"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    kind = get_origin(hint) or hint
    return TYPE_NAMES.get(kind) or f"{kind.__name__}(...)"


def check_fields(config: Any, section: str = "") -> None:
    """Raises InputError for the first field of a dataclass whose value is not of its declared type,
    choices or range. `section` is the option's prefix, as in `training.steps_phase1`."""
    for name, hints in field_types(type(config)).items():
        value = getattr(config, name)
        if not any(accepts(hint, value) for hint in hints):
            wanted = ", or ".join(map(describe_type, hints))
            raise InputError(f"{section}{name} = {value!r} must be {wanted}")


def check_top_k(top_k_name: str, top_k: int, experts_name: str, num_experts: int) -> None:
    """Raises InputError, by these names, unless a token can visit `top_k` of `num_experts` experts
    and the router learns from it."""
    chosen, experts = f"{top_k_name} = {top_k}", f"{experts_name} = {num_experts}"
    require(1 <= top_k <= num_experts, f"{chosen} must be between 1 and {experts}")
    require(
        top_k > 1 or num_experts == 1,
        f"{chosen} with {experts}: the weights of the chosen experts sum to 1, so that of a single "
        f"one is always 1 and the loss gives the router no gradient; take {top_k_name} = 2 or more",
    )


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary wavelengths of an imported model are stretched for a context longer than the
    one it was first trained on. Fields are named as in transformers."""

    rope_type: Literal["default", "linear", "llama3"] = "default"
    """`default` stretches nothing. `linear` stretches every wavelength by `factor`. `llama3`
    stretches the long ones by `factor`, keeps the short ones, and blends between them."""
    factor: PositiveFloat = 1.0
    """How many times as long a stretched wavelength becomes."""
    low_freq_factor: PositiveFloat = 1.0
    """A wavelength counts as long if it fits into the original context fewer times than this."""
    high_freq_factor: PositiveFloat = 4.0
    """A wavelength counts as short if it fits into the original context more times than this."""
    original_max_position_embeddings: PositiveInt = 8192
    """Tokens of context that the model was first trained on."""

    def __post_init__(self) -> None:
        check_fields(self, "model.rope_scaling.")
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"model.rope_scaling.high_freq_factor = {self.high_freq_factor} must be "
            f"above model.rope_scaling.low_freq_factor = {self.low_freq_factor}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: a Llama when dense, a Mixtral with experts."""

    vocab_size: NonNegativeInt = 50_257
    """Rows of the token embedding. 0 takes the tokenizer's number of tokens. A learned tokenizer
    learns as many as this, or 2,048 if this is 0 or GPT-2's 50,257."""
    d_model: PositiveInt = 512
    """Width of the residual stream."""
    n_layers: PositiveInt = 12
    """Blocks, each of attention and a feed-forward or experts."""
    n_heads: PositiveInt = 8
    """Query heads in each block."""
    n_kv_heads: PositiveInt | None = None
    """Key/value heads, each serving n_heads / n_kv_heads query heads. None takes n_heads."""
    head_dim: PositiveInt | None = None
    """Width of a head, which growth never changes. None takes d_model / n_heads."""
    d_ff: PositiveInt = 1408
    """Inner width of the SwiGLU feed-forward, or of each expert."""
    seq_len: PositiveInt = 256
    """Context in tokens."""
    num_experts: NonNegativeInt = 0
    """Experts in each layer. 0 makes a dense model."""
    top_k: NonNegativeInt = 2
    """Experts that each token visits: at least 2 of several, because the weight of a single one is
    always 1 and teaches the router nothing. A dense model ignores it."""
    position_embedding: Literal["rope", "learned"] = "rope"
    """`rope` rotates queries and keys by their position; `learned` adds a learned embedding."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """How the rotary wavelengths are stretched."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head as well."""
    logit_scale: PositiveFloat = 1.0
    """Factor on the logits. Widening by r divides it by r where the embeddings are tied."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        require(
            self.d_model % self.n_heads == 0,
            f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model}",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_kv_heads = {self.n_kv_heads} does not divide model.n_heads = {self.n_heads}",
        )
        require(
            self.position_embedding != "rope" or self.head_size % 2 == 0,
            f"rotary positions need an even head size: model.d_model = {self.d_model} over "
            f"model.n_heads = {self.n_heads} gives {self.head_size}"
            if self.head_dim is None
            else f"rotary positions need an even head size, not model.head_dim = {self.head_dim}",
        )
        if self.num_experts:
            check_top_k("model.top_k", self.top_k, "model.num_experts", self.num_experts)

    @property
    def kv_heads(self) -> int:
        """Key/value heads, `n_kv_heads` resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        """Width of a head, `head_dim` resolved."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """The inverse of `asdict`; a missing field takes its default."""
        scaling = RopeScaling(**values.get("rope_scaling", {}))
        return cls(**{**values, "rope_scaling": scaling})

    @property
    def num_params(self) -> int:
        """All parameters of the model."""
        return self._count_params(experts=self.num_experts)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token passes through: those of top_k experts, not of all."""
        return self._count_params(experts=min(self.top_k, self.num_experts))

    def _count_params(self, experts: int) -> int:
        heads, kv = self.n_heads * self.head_size, self.kv_heads * self.head_size
        attention = self.d_model * (2 * heads + 2 * kv)
        ffn = 3 * self.d_model * self.d_ff * (experts or 1) + self.d_model * self.num_experts
        tables = self.vocab_size * (1 if self.tie_embeddings else 2)
        tables += self.seq_len if self.position_embedding == "learned" else 0
        norms = (2 * self.n_layers + 1) * self.d_model
        return self.n_layers * (attention + ffn) + tables * self.d_model + norms


@dataclass(frozen=True)
class Tolerance:
    """How far a growth may move the model's function on the probe batch before the run stops,
    judged in float64 where the device has it (not on MPS). None takes what is measured."""

    max_logit_drift: NonNegativeFloat | None = None
    """Largest |logit difference|. None: what rounding may do where the function is kept, 1e-8 of
    the largest logit and, where noise is stored, 8 times what rounding the old weights once does;
    no limit where the function changes."""
    max_loss_drift: NonNegativeFloat | None = None
    """Largest change of the loss in nats per token. None: twice what rounding may do to a logit
    where the function is kept, and 2 where it changes, five times what re-initialising half of each
    expert cost (docs/growth.md)."""

    def __post_init__(self) -> None:
        check_fields(self, "tolerance.")


@dataclass(frozen=True)
class Upcycle:
    """Turns every feed-forward into `num_experts` copies of itself behind a router."""

    num_experts: PositiveInt = 8
    """Experts in each layer."""
    top_k: PositiveInt = 2
    """Experts that each token visits, at least 2 of several."""
    router_init_scale: PositiveFloat = 1.0
    """Factor on the Xavier-uniform initial weights of the routers."""
    reinit_fraction: Fraction = 0.0
    """Fraction of each expert's inner units to re-initialise (0.5 in Drop-Upcycling), so that the
    experts begin apart. Above 0 the function is not kept."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    """How far this growth may move the function."""

    def __post_init__(self) -> None:
        check_fields(self, "upcycle.")
        check_top_k("upcycle.top_k", self.top_k, "upcycle.num_experts", self.num_experts)

    @property
    def is_exact(self) -> bool:
        """Whether the function is kept."""
        return not self.reinit_fraction

    @property
    def sparsity(self) -> float:
        """How many experts there are for each that a token visits."""
        return self.num_experts / self.top_k


@dataclass(frozen=True)
class Widen:
    """Repeats residual stream, heads and feed-forward `factor` times; a head keeps its size."""

    factor: PositiveInt = 2
    """How many times as wide the model becomes."""
    noise: NonNegativeFloat = 0.1
    """Standard deviation of the noise on the copies, relative to each weight's own. The noise
    cancels over the copied inputs, so the function is kept. At 0 all copies get equal gradients
    and stay equal for ever."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    """How far this growth may move the function."""

    def __post_init__(self) -> None:
        check_fields(self, "widen.")

    @property
    def is_exact(self) -> bool:
        """Whether the function is kept."""
        return True


Placement = Literal["interleaved", "end", "middle"]
BlockInit = Literal["identity", "copy"]


@dataclass(frozen=True)
class Deepen:
    """Inserts new blocks. Adam starts afresh in each of them."""

    extra_layers: NonNegativeInt = 3
    """Number of new blocks."""
    placement: Placement = "interleaved"
    """`interleaved` spreads the new blocks evenly between the old ones, `end` puts them after the
    last, `middle` puts them all in the middle."""
    init: BlockInit = "identity"
    """`identity` sets the new output projections to zero, which keeps the function. `copy` repeats
    the old blocks before each run of new ones (G_stack), which changes it."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    """How far this growth may move the function."""

    def __post_init__(self) -> None:
        check_fields(self, "deepen.")

    @property
    def is_exact(self) -> bool:
        """Whether the function is kept."""
        return self.init == "identity" or not self.extra_layers


Growth = Upcycle | Widen | Deepen


@dataclass(frozen=True)
class Phase:
    """One stretch of training, and how the model of the phase before grows into this one's."""

    growth: Growth | None = None
    """The operator that grows the model before this phase. None trains the model as it is."""
    steps: NonNegativeInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 8
    """Sequences of seq_len tokens in each optimizer step."""
    lr: NonNegativeFloat = 3e-4
    """Peak learning rate."""
    checkpoint: str = ""
    """File name of the trained model. Empty takes <phase>_final.pt."""
    init_checkpoint: str = ""
    """File name of the grown model before training. Empty writes none."""

    def __post_init__(self) -> None:
        check_fields(self)


LrScaling = Literal["none", "width"]
StateOnGrowth = Literal["carry", "reset", "reset-warmup"]
DecayTarget = Literal["next_peak", "floor"]


@dataclass(frozen=True)
class TrainingConfig:
    """The four phases of the default schedule, and how every phase is trained."""

    steps_phase1: NonNegativeInt = 1000
    """Optimizer steps in phase 1, the dense model."""
    steps_phase2: NonNegativeInt = 1000
    """Optimizer steps in phase 2, after upcycling."""
    steps_phase3: NonNegativeInt = 500
    """Optimizer steps in phase 3, after widening."""
    steps_phase4: NonNegativeInt = 500
    """Optimizer steps in phase 4, after deepening."""
    lr_phase1: NonNegativeFloat = 3e-4
    """Peak learning rate in phase 1."""
    lr_phase2: NonNegativeFloat = 2e-4
    """Peak learning rate in phase 2."""
    lr_phase3: NonNegativeFloat = 1e-4
    """Peak learning rate in phase 3."""
    lr_phase4: NonNegativeFloat = 5e-5
    """Peak learning rate in phase 4."""
    batch_size: PositiveInt = 8
    """Sequences in each optimizer step of phases 1 and 2."""
    batch_size_phase3: PositiveInt = 2
    """Sequences in each optimizer step of phase 3."""
    batch_size_phase4: PositiveInt = 1
    """Sequences in each optimizer step of phase 4."""
    upcycle: Upcycle = field(default_factory=Upcycle)
    """How phase 1's model becomes phase 2's."""
    widen: Widen = field(default_factory=Widen)
    """How phase 2's model becomes phase 3's."""
    deepen: Deepen = field(default_factory=Deepen)
    """How phase 3's model becomes phase 4's."""

    micro_batch_size: PositiveInt | None = None
    """Sequences to process at a time, gradients being added up: in float32, but in bf16 with
    low_memory, which is off by about 0.4 % with 8 micro-batches and by 3 % with 512. The
    load-balancing loss is then taken over each micro-batch, not over the whole batch, so that above
    all the routers' gradients are other ones. None processes the batch at once."""
    low_memory: bool = False
    """Train with FlashAdamW (24-bit weights, 8-bit moments; needs flashoptim and CUDA): 7 bytes a
    parameter in place of the fused kernels' 14, or 16 with micro-batches. Between phases Adam's
    state, 8 bytes a parameter, lies on the CPU."""
    fused_kernels: bool = True
    """Use Triton kernels for bf16 on CUDA, and a bf16 copy of the weights that is cast once a step.
    Off uses torch's own operations under autocast."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Run the fused step as one CUDA graph. `auto` does so in phases long enough for it to pay."""
    lr_scaling: LrScaling = "width"
    """`width` divides the learning rate of each matrix by how often widening has repeated its input
    axis, multiplies its weight decay by as much, and scales Adam's eps as gradients were scaled. At
    equal rates a model widened without noise then trains as it would have before, clipping and
    decay included. With noise, and after upcycling or deepening, it does not: the copies, experts
    and new blocks learn something of their own. `none` uses one rate for all, which after widening
    by 2 changes the function twice as fast."""
    optimizer_state_on_growth: StateOnGrowth = "carry"
    """What happens to Adam's moments at a growth. `carry` grows them with the weights and warms the
    learning rate up. `reset` drops them and starts at the peak rate. `reset-warmup` drops them and
    warms the learning rate up."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay on matrices and embeddings; gains of norms do not decay."""
    grad_clip: PositiveFloat = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it. All copies of a parameter
    together count in the norm as much as it did before its growth: exactly so after widening
    without noise, about so after upcycling. New blocks and routers add to the norm."""
    beta1: Decay = 0.9
    """Decay of Adam's first moment."""
    beta2: Decay = 0.95
    """Decay of Adam's second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of Adam's second moment."""
    warmup_fraction: Fraction = 0.05
    """Fraction of each phase's steps over which the learning rate rises to its peak."""
    min_lr_ratio: Fraction = 0.1
    """Where the learning rate of the last phase ends, as a fraction of its peak."""
    decay_to: DecayTarget = "next_peak"
    """Where the learning rate of the earlier phases ends. `next_peak`: at the next phase's peak if
    that is lower, so that the loss need not rise when the rate does. `floor`: at min_lr_ratio."""
    load_balance_coef: NonNegativeFloat = 1e-2
    """Weight of the load-balancing loss (a mean over layers)."""
    z_loss_coef: NonNegativeFloat = 1e-3
    """Weight of the router z-loss (a mean over layers)."""
    log_every: PositiveInt = 10
    """Optimizer steps between `step` lines in the history."""
    eval_every: PositiveInt = 100
    """Optimizer steps between evaluations; a phase's start and end are always evaluated."""
    eval_tokens: NonNegativeInt = 32_768
    """Validation tokens in each evaluation, the same ones every time, from windows that are spread
    evenly over all of the validation text."""
    final_eval_tokens: NonNegativeInt = 131_072
    """Validation tokens in the evaluation at the end of each phase: those of every evaluation, and
    more from between them."""
    probe_sequences: PositiveInt = 8
    """Sequences in the frozen probe batch that judges each growth, spread evenly over all of the
    validation text."""
    checkpoint_every: str = "5min"
    """How often to keep a point to resume from within a phase: minutes (5min) or steps (200)."""
    sample_tokens: NonNegativeInt = 80
    """Length of the sample stories at the end of each phase. 0 writes none."""

    def __post_init__(self) -> None:
        check_fields(self, "training.")
        require(
            re.fullmatch(r"[1-9]\d*(min)?", self.checkpoint_every) is not None,
            f"training.checkpoint_every = {self.checkpoint_every!r} is neither a number of steps "
            "(200) nor of minutes (5min)",
        )


SCHEDULE_FIELDS = ["upcycle", "widen", "deepen", "batch_size"]
SCHEDULE_FIELDS += [f.name for f in fields(TrainingConfig) if "_phase" in f.name]
"""Fields of TrainingConfig that make the default schedule; a `Run` with `phases` ignores them."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "auto"
    """`auto`: TinyStories from the hub, or the built-in stories where no hub can be reached.
    `tinystories`: TinyStories or an error. `hub:NAME`: another text dataset on the hub. `builtin`:
    stories from a small seeded grammar, no network. Anything else is a path: a file (.txt or .md,
    with <|endoftext|> between stories; .jsonl, .json or .parquet; also .gz, .xz or .zst of these)
    or a folder of them. In a folder, valid, validation, val or dev is the validation text, and so
    is stories-valid beside stories-train; test text is left out."""
    tokenizer: str = "auto"
    """A tokenizer.json or a folder with one, a name on the hub, a checkpoint of this project (.pt),
    or `learned`, a byte-level BPE learned on the text itself, without a download. `auto` takes
    gpt2, and `learned` for the built-in stories and where no hub can be reached."""
    eos_token: str = ""
    """The token that ends a text, such as </s>. Empty takes the one that the tokenizer's files
    name; a tokenizer whose files name none needs this."""
    num_stories: NonNegativeInt | None = None
    """Largest number of stories to read. 0 reads all. None reads all of a file or folder, and
    50,000 from the hub."""
    builtin_stories: PositiveInt = 50_000
    """How many built-in stories to make, unless num_stories says how many."""
    text_field: str = ""
    """Field that holds the text in JSON, parquet or a dataset from the hub. Empty takes `text`, or
    the only field of text."""
    config: str = ""
    """Configuration of a dataset from the hub that has several. Empty takes its default."""
    split: str = ""
    """Split of a dataset from the hub to train on. Empty takes those whose first word is train."""
    valid_split: str = ""
    """Split of a dataset from the hub to validate on. Empty takes those whose first word is valid,
    validation, val or dev."""
    valid_fraction: Annotated[float, Range(0, 1, exclude=(0, 1))] = 0.05
    """Share of the text to hold out for validation where the source keeps none apart: whole
    documents, or the end of the text where there is only one."""
    cache: Path = Path("~/.cache/model-growth")
    """Folder in which tokens are written once and found again."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        is_on_hub = self.source in ("auto", "tinystories") or self.source.startswith("hub:")
        for name in ("config", "split", "valid_split"):
            require(
                is_on_hub or not getattr(self, name),
                f"data.{name} = {getattr(self, name)}: data.source = {self.source} is no dataset "
                "on the hub",
            )
        require(
            not self.split or self.split != self.valid_split,
            f"data.split = {self.split} is data.valid_split too",
        )


TrackerName = Literal["none", "tensorboard", "wandb"]


@dataclass(frozen=True)
class Run:
    """A language model that grows while it trains."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    phases: dict[str, Phase] = field(default_factory=dict)
    """A schedule of your own, by name and in order. Empty takes the four phases of `training`."""
    init_from: str = ""
    """Start from a model: a checkpoint of this project (.pt), or a Llama or Mixtral in
    transformers' format, a folder or a name on the hub. It brings its tokenizer and all of model.*
    but the context to train on (seq_len). One that has experts needs a schedule without upcycling,
    such as those of the presets grow_moe and single. Adam starts afresh."""
    out: Path = Path("checkpoints")
    """Folder for checkpoints, history and plot."""
    seed: Seed = 0
    """Seed of the initial weights, the batches, the noise of growth and the samples."""
    device: str = "auto"
    """Where to compute: auto (CUDA, then MPS, then CPU), cuda, cuda:1, mps or cpu. Nothing has been
    run on Apple's MPS yet."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the training step; weights and optimizer are float32. `auto` takes bf16 on CUDA
    and on CPUs that compute it natively (AVX512-BF16, AMX)."""
    tracker: TrackerName = "none"
    """Send the history's numbers, the growths and the picture to a tracker too: tensorboard (`pip
    install tensorboard`) finds them in `out`/tensorboard, wandb is Weights & Biases (`pip install
    wandb`). If the tracker fails, the run goes on without it."""
    resume: bool = False
    """Go on exactly where the run in `out` stopped. From there on rates, steps, batch sizes and the
    like may be others: those that the command line sets; the rest stay as the run was left. A run
    that has ended says how to train its model further."""
    overwrite: bool = False
    """Replace what an earlier run left in `out`."""
    dry_run: bool = False
    """Prepare the data, print what would run, phase by phase, and whether it would start, and stop.
    Exits with 2 where it would not: where memory or disk is short, or `out` may not be written."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, phase in self.phases.items():
            require(isinstance(phase, Phase), f"phases[{name!r}] = {phase!r} must be Phase(...)")
        require(
            not (self.resume and self.overwrite), "resume goes on with what overwrite would remove"
        )
        require(
            not self.init_from or self.data.tokenizer in ("auto", self.init_from),
            f"data.tokenizer = {self.data.tokenizer}: the model that init_from names has its own",
        )
        default = TrainingConfig()
        changed = [
            name
            for name in SCHEDULE_FIELDS
            if getattr(self.training, name) != getattr(default, name)
        ]
        require(
            not (self.phases and changed),
            f"phases is set ({', '.join(self.phases)}), so training.{', training.'.join(changed)} "
            "would have no effect: set the fields of the phases, or start from TrainingConfig()",
        )

    @property
    def schedule(self) -> dict[str, Phase]:
        """The phases of the run, by name and in order."""
        return self.phases or four_phases(self.training)


def find_presets(namespace: dict[str, Any]) -> dict[str, Callable[[], Run]]:
    """Returns by name the presets that a module defines, given its names: the public functions that
    are annotated `-> Run` and need no argument."""
    return {
        name: function
        for name, function in namespace.items()
        if isinstance(function, FunctionType)
        and function.__module__ == namespace["__name__"]
        and function.__annotations__.get("return") in (Run, "Run", "config.Run")
        and all(p.default is not p.empty for p in signature(function).parameters.values())
        and not name.startswith("_")
    }


PRESETS = find_presets(globals())
