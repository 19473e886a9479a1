"""What a run is, as data: the model, the phases and how each grows out of the one before.

A preset is a function that returns a complete `Run`; the command line overrides fields of it.
"""

import re
from dataclasses import dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple, get_args


class InputError(ValueError):
    """Something the user asked for cannot be done. The message names the field and the value."""


def require(holds: bool, message: str) -> None:
    """Raises InputError with `message` unless the condition on a user's value `holds`."""
    if not holds:
        raise InputError(message)


@dataclass(frozen=True)
class RopeScaling:
    """How a model that comes from elsewhere stretches its rotary wavelengths over a longer context
    than it was first trained on; named as in transformers."""

    rope_type: Literal["default", "linear", "llama3"] = "default"
    """`default`: not at all. `linear`: all by `factor`. `llama3`: long ones by `factor`, short ones
    not at all, those between by something between."""
    factor: float = 1.0
    """Times as long."""
    low_freq_factor: float = 1.0
    """A wavelength is long that fits in the original context less often than this."""
    high_freq_factor: float = 4.0
    """And short if it fits in more often than this."""
    original_max_position_embeddings: int = 8192
    """The original context, in tokens."""

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "original_max_position_embeddings"):
            value = getattr(self, name)
            require(
                0 < value < inf, f"model.rope_scaling.{name} = {value} must be positive and finite"
            )
        require(
            self.low_freq_factor < self.high_freq_factor < inf,
            f"model.rope_scaling.high_freq_factor = {self.high_freq_factor} must be finite and "
            f"above model.rope_scaling.low_freq_factor = {self.low_freq_factor}",
        )
        require(
            self.rope_type in ("default", "linear", "llama3"),
            f"model.rope_scaling.rope_type = {self.rope_type!r} must be 'default', 'linear' or "
            "'llama3'",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: a Llama when dense, a Mixtral with experts."""

    vocab_size: int = 50_257
    """0 takes the tokenizer's."""
    d_model: int = 512
    """Width of the residual stream."""
    n_layers: int = 12
    """Blocks of attention and feed-forward."""
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int | None = None
    """Key/value heads, each serving n_heads / n_kv_heads query heads; None: as many as n_heads."""
    head_dim: int | None = None
    """Width of a head; None: d_model / n_heads. Growing leaves it as it is."""
    d_ff: int = 1408
    """Inner width of the SwiGLU feed-forward, per expert."""
    seq_len: int = 256
    """Context in tokens."""
    num_experts: int = 0
    """Experts per layer; 0 is a dense model."""
    top_k: int = 2
    """Experts that each token visits; unused in a dense model."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary positions, or a learned embedding of each."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    """How they are stretched."""
    tied: bool = True
    """The head is the token embedding."""
    logit_scale: float = 1.0
    """Logits are multiplied by it: widening by r divides it by r where the head is tied."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "d_ff", "seq_len"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name} = {value} must be at least 1")
        require(self.vocab_size >= 0, f"model.vocab_size = {self.vocab_size} must not be negative")
        require(
            self.d_model % self.n_heads == 0,
            f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model}",
        )
        require(
            self.kv_heads >= 1 and self.n_heads % self.kv_heads == 0,
            f"model.n_kv_heads = {self.n_kv_heads} does not divide model.n_heads = {self.n_heads}",
        )
        require(
            self.head_dim is None or self.head_dim >= 1,
            f"model.head_dim = {self.head_dim} must be at least 1",
        )
        require(
            self.position != "rope" or self.head_size % 2 == 0,
            f"rotary positions need an even head size: model.d_model = {self.d_model} over "
            f"model.n_heads = {self.n_heads} gives {self.head_size}"
            if self.head_dim is None
            else f"rotary positions need an even head size, not model.head_dim = {self.head_dim}",
        )
        require(self.num_experts >= 0, f"model.num_experts = {self.num_experts} is negative")
        require(
            not self.num_experts or 1 <= self.top_k <= self.num_experts,
            f"model.top_k = {self.top_k} must be between 1 and "
            f"model.num_experts = {self.num_experts}",
        )
        for name in ("norm_eps", "rope_theta", "logit_scale"):
            value = getattr(self, name)
            require(0 < value < inf, f"model.{name} = {value} must be positive and finite")
        require(
            self.position in ("rope", "learned"),
            f"model.position = {self.position!r} must be 'rope' or 'learned'",
        )

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @classmethod
    def of(cls, values: dict) -> "ModelConfig":
        """The inverse of `asdict`; what is not there has its default."""
        scaling = RopeScaling(**values.get("rope_scaling", {}))
        return cls(**{**values, "rope_scaling": scaling})

    @property
    def num_params(self) -> int:
        return self._count(experts=self.num_experts)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token passes through: top_k of the experts."""
        return self._count(experts=min(self.top_k, self.num_experts))

    def _count(self, experts: int) -> int:
        heads, kv = self.n_heads * self.head_size, self.kv_heads * self.head_size
        attention = self.d_model * (2 * heads + 2 * kv)
        ffn = 3 * self.d_model * self.d_ff * (experts or 1) + self.d_model * self.num_experts
        tables = self.vocab_size * (1 if self.tied else 2)
        tables += self.seq_len if self.position == "learned" else 0
        norms = (2 * self.n_layers + 1) * self.d_model
        return self.n_layers * (attention + ffn) + tables * self.d_model + norms


class Limits(NamedTuple):
    """How far growing may move a model on the probe batch, in float32."""

    logit: float
    """Largest |logit difference|."""
    loss: float
    """Change of the loss, in nats per token."""


TIGHT = Limits(1e-4, 1e-4)
"""For growth that keeps the function: what rounding leaves."""
LOOSE = Limits(inf, 2.0)
"""For growth that does not: four times what redrawing half of each expert cost (GROWTH.md)."""


def check_limits(how: "Growth") -> None:
    for name in ("max_logit_drift", "max_loss_drift"):
        value = getattr(how, name)
        fits = value is None or 0 <= value < inf
        require(fits, f"{name} = {value} must be finite and not negative")


def chosen_limits(how: "Growth", default: Limits) -> Limits:
    """Those that the user set, and the default for those that are None."""
    logit, loss = how.max_logit_drift, how.max_loss_drift
    return Limits(default.logit if logit is None else logit, default.loss if loss is None else loss)


@dataclass(frozen=True)
class Upcycle:
    """Every feed-forward becomes `num_experts` copies of itself behind a router."""

    num_experts: int = 8
    """Experts in each layer."""
    top_k: int = 2
    """Experts that each token visits."""
    router_scale: float = 1.0
    """The router's first weights, as a multiple of Xavier's law."""
    redrawn: float = 0.0
    """Share of each expert's inner dimensions drawn anew (Drop-Upcycling takes 0.5): the experts
    begin apart, and the function is not kept."""
    max_logit_drift: float | None = None
    """Largest |logit difference| allowed on the probe batch, in float32. None: 1e-4, and without
    limit where a part is redrawn."""
    max_loss_drift: float | None = None
    """Largest change of the probe loss allowed, in nats. None: 1e-4, and 2 where a part is
    redrawn."""

    def __post_init__(self) -> None:
        check_limits(self)
        require(self.num_experts >= 1, f"num_experts = {self.num_experts} must be at least 1")
        require(
            1 <= self.top_k <= self.num_experts,
            f"top_k = {self.top_k} must be between 1 and num_experts = {self.num_experts}",
        )
        scale, redrawn = self.router_scale, self.redrawn
        require(0 < scale < inf, f"router_scale = {scale} must be positive and finite")
        require(0 <= redrawn <= 1, f"redrawn = {redrawn} must be between 0 and 1")

    @property
    def exact(self) -> bool:
        """Whether the function is kept."""
        return not self.redrawn

    @property
    def limits(self) -> Limits:
        return chosen_limits(self, TIGHT if self.exact else LOOSE)


@dataclass(frozen=True)
class Widen:
    """Residual stream, heads and feed-forward repeated `factor` times; a head keeps its size."""

    factor: int = 2
    """Copies of each unit."""
    noise: float = 0.1
    """Noise on the copies, relative to each weight's standard deviation; it cancels over the copied
    inputs, so the function is kept. At 0 the copies get equal gradients and stay equal for ever."""
    max_logit_drift: float | None = None
    """Largest |logit difference| allowed on the probe batch, in float32. None: 1e-3."""
    max_loss_drift: float | None = None
    """Largest change of the probe loss allowed, in nats. None: 1e-4."""

    def __post_init__(self) -> None:
        check_limits(self)
        require(self.factor >= 1, f"factor = {self.factor} must be at least 1")
        require(0 <= self.noise < inf, f"noise = {self.noise} must be finite and not negative")

    @property
    def exact(self) -> bool:
        """Whether the function is kept."""
        return True

    @property
    def limits(self) -> Limits:
        return chosen_limits(self, TIGHT._replace(logit=1e-3))


Where = Literal["interleaved", "end", "middle"]
Init = Literal["identity", "copy"]


@dataclass(frozen=True)
class Deepen:
    """New blocks that add nothing yet, or copies of the old ones. Adam warms up anew in each."""

    extra_layers: int = 3
    """New blocks."""
    where: Where = "interleaved"
    """Between the old blocks, as evenly as can be, after them, or all in the middle."""
    init: Init = "identity"
    """identity: output projections of zero, so that the function is kept. copy: each run of new
    blocks repeats the old ones before it (G_stack), which changes the function."""
    max_logit_drift: float | None = None
    """Largest |logit difference| allowed on the probe batch, in float32. None: 1e-4, and without
    limit for copies."""
    max_loss_drift: float | None = None
    """Largest change of the probe loss allowed, in nats. None: 1e-4, and 2 for copies."""

    def __post_init__(self) -> None:
        check_limits(self)
        require(self.extra_layers >= 0, f"extra_layers = {self.extra_layers} is negative")
        require(
            self.where in get_args(Where),
            f"where = {self.where!r} must be 'interleaved', 'end' or 'middle'",
        )
        require(self.init in get_args(Init), f"init = {self.init!r} must be 'identity' or 'copy'")

    @property
    def exact(self) -> bool:
        """Whether the function is kept."""
        return self.init == "identity" or not self.extra_layers

    @property
    def limits(self) -> Limits:
        return chosen_limits(self, TIGHT if self.exact else LOOSE)


Growth = Upcycle | Widen | Deepen


@dataclass(frozen=True)
class Phase:
    """One stretch of training, and how the model of the phase before becomes this one's."""

    grow: Growth | None = None
    """None trains the model as it is."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences of seq_len tokens in each optimizer step."""
    lr: float = 3e-4
    """Peak learning rate."""
    checkpoint: str = ""
    """File name of the trained model; empty: <phase>_final.pt."""
    init_checkpoint: str = ""
    """File name of the model just grown, before training; empty: not written."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"steps = {self.steps} must not be negative")
        require(self.batch_size >= 1, f"batch_size = {self.batch_size} must be at least 1")
        require(0 <= self.lr < inf, f"lr = {self.lr} must be finite and not negative")


Scaling = Literal["same", "width"]
AtGrowth = Literal["carry", "reset", "reset-warmup"]
Anneal = Literal["last", "each"]


@dataclass(frozen=True)
class TrainingConfig:
    """The four phases of the default schedule, and how every phase is trained."""

    steps_phase1: int = 1000
    """Optimizer steps of the dense phase."""
    steps_phase2: int = 1000
    """Of the mixture of experts."""
    steps_phase3: int = 500
    """Of the wider one."""
    steps_phase4: int = 500
    """Of the deeper one."""
    lr_phase1: float = 3e-4
    """Peak learning rate of the dense phase."""
    lr_phase2: float = 2e-4
    """Of the mixture of experts."""
    lr_phase3: float = 1e-4
    """Of the wider one."""
    lr_phase4: float = 5e-5
    """Of the deeper one."""
    batch_size: int = 8
    """Sequences per optimizer step in phases 1 and 2."""
    batch_size_phase3: int = 2
    """Sequences per optimizer step in phase 3."""
    batch_size_phase4: int = 1
    """Sequences per optimizer step in phase 4."""
    upcycle: Upcycle = Upcycle()
    """How phase 1's model becomes phase 2's."""
    widen: Widen = Widen()
    """How phase 2's model becomes phase 3's."""
    deepen: Deepen = Deepen()
    """How phase 3's model becomes phase 4's."""

    micro_batch_size: int | None = None
    """Sequences at a time, gradients added up; a mixture's balance loss is then that of each micro-
    batch, which is not quite that of the whole. None: the batch at once."""
    lean: bool = False
    """AdamW with 24-bit weights and 8-bit moments (flashoptim, CUDA): 7 bytes a parameter instead
    of 16. Between phases Adam's memory, 8 bytes a parameter, is on the CPU."""
    fused: bool = True
    """Triton kernels for bf16 on CUDA, and one bf16 copy of the weights cast once a step; off:
    torch's own operations under autocast."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Run the fused step as one CUDA graph. auto: in phases long enough for it to pay."""
    lr_scaling: Scaling = "width"
    """width: the learning rate of each matrix is divided by how often its input axis has been
    copied, its decay multiplied by as much, Adam's eps scaled as the gradients were: a model
    widened without noise then trains exactly as it would have before, and its loss does not jump.
    same: one rate for all, which after widening by 2 changes the function twice as fast."""
    at_growth: AtGrowth = "carry"
    """Adam's memory in a phase that grew: carried over, and the learning rate warms up. reset: it
    forgets, and starts at the peak. reset-warmup: it forgets, and the learning rate warms up."""
    weight_decay: float = 0.01
    """Decoupled, on matrices and embeddings; gains of norms are left alone."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    warmup: float = 0.05
    """Share of each phase's steps over which the learning rate rises to its peak."""
    lr_floor: float = 0.1
    """What the cosine decay of the last phase ends at, as a share of the peak."""
    anneal: Anneal = "last"
    """What that of the phases before it ends at. last: at the next phase's peak, where that is
    lower, so that the loss need not rise again when the rate does. each: as the last one."""
    balance_coef: float = 1e-2
    """Weight of the load-balancing loss (mean over layers)."""
    z_coef: float = 1e-3
    """Weight of the router's z-loss (mean over layers)."""
    log_every: int = 10
    """Steps between lines in the history."""
    eval_every: int = 100
    """Steps between evaluations on held-out text; the start and the end of a phase always are."""
    eval_tokens: int = 32_768
    """Held-out tokens per evaluation."""
    probe_sequences: int = 8
    """Sequences in the frozen batch that judges each growth."""
    checkpoint_every: str = "5min"
    """How often to keep where the run stands, within a phase: minutes, or a number of steps."""
    sample_tokens: int = 80
    """Length of the stories written at the end of each phase; 0 writes none."""

    def __post_init__(self) -> None:
        phases = [f.name for f in fields(self) if "_phase" in f.name or f.name == "batch_size"]
        sizes = [name for name in phases if name.startswith("batch_size")]
        for name in (*sizes, "log_every", "eval_every", "probe_sequences"):
            value = getattr(self, name)
            require(value >= 1, f"training.{name} = {value} must be at least 1")
        for name in (
            *phases,
            "weight_decay",
            "eval_tokens",
            "sample_tokens",
            "balance_coef",
            "z_coef",
        ):
            value = getattr(self, name)
            require(0 <= value < inf, f"training.{name} = {value} must be finite and not negative")
        for name in ("warmup", "lr_floor"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"training.{name} = {value} must be between 0 and 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name} = {value} must be in [0, 1)")
        for name in ("grad_clip", "eps"):
            value = getattr(self, name)
            require(0 < value < inf, f"training.{name} = {value} must be positive and finite")
        choices = {"lr_scaling": Scaling, "at_growth": AtGrowth, "anneal": Anneal}
        for name, values in ((name, get_args(kind)) for name, kind in choices.items()):
            value = getattr(self, name)
            require(value in values, f"training.{name} = {value!r} must be one of {values}")
        require(
            re.fullmatch(r"[1-9]\d*(min)?", self.checkpoint_every) is not None,
            f"training.checkpoint_every = {self.checkpoint_every!r} is neither a number of steps "
            "(200) nor of minutes (5min)",
        )
        micro = self.micro_batch_size
        require(
            micro is None or micro >= 1, f"training.micro_batch_size = {micro} must be at least 1"
        )

    def phases(self) -> dict[str, Phase]:
        """The default schedule: dense, mixture of experts, wider, deeper."""
        return {
            "dense": Phase(
                steps=self.steps_phase1,
                batch_size=self.batch_size,
                lr=self.lr_phase1,
                checkpoint="dense_model.pt",
            ),
            "moe": Phase(
                self.upcycle,
                steps=self.steps_phase2,
                batch_size=self.batch_size,
                lr=self.lr_phase2,
                checkpoint="moe_model_final.pt",
                init_checkpoint="moe_model_init.pt",
            ),
            "wide": Phase(
                self.widen,
                steps=self.steps_phase3,
                batch_size=self.batch_size_phase3,
                lr=self.lr_phase3,
                checkpoint="medium_moe_final.pt",
            ),
            "deep": Phase(
                self.deepen,
                steps=self.steps_phase4,
                batch_size=self.batch_size_phase4,
                lr=self.lr_phase4,
                checkpoint="large_moe_final.pt",
            ),
        }


SCHEDULE_FIELDS = ["upcycle", "widen", "deepen", "batch_size"]
SCHEDULE_FIELDS += [f.name for f in fields(TrainingConfig) if "_phase" in f.name]
"""What makes the default schedule; beside `Run.phases` these fields of TrainingConfig are idle."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "auto"
    """`auto`: TinyStories from the hub, or the built-in stories where no hub can be reached.
    `tinystories`: from the hub, or an error. `hub:NAME`: another text dataset there.
    `builtin`: stories from a small seeded grammar, no network. Anything else is a path: a text
    file (.txt, .txt.gz; stories separated by <|endoftext|>) or a folder of them, where files named
    valid* are the held-out text."""
    tokenizer: str = "auto"
    """A folder with a tokenizer.json or a name on the hub. `auto`: gpt2, and for the built-in
    stories `learned`, a byte-level BPE learned on the text itself."""
    num_stories: int = 50_000
    """Read no more than this many stories; 0 reads all."""
    text_field: str = "text"
    """The column that holds the text in a dataset from the hub."""
    holdout: float = 0.05
    """Share of the stories held out for validation where the source has no split for it."""
    cache: Path = Path("~/.cache/model-growth")
    """Tokens are written here once."""

    def __post_init__(self) -> None:
        require(self.num_stories >= 0, f"data.num_stories = {self.num_stories} is negative")
        require(0 < self.holdout < 1, f"data.holdout = {self.holdout} must lie between 0 and 1")


Tracker = Literal["none", "tensorboard"]


@dataclass(frozen=True)
class Run:
    """A language model that grows while it trains."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    phases: dict[str, Phase] = field(default_factory=dict)
    """A schedule of its own, by name and in order; empty: the four phases of `training`."""
    init_from: str = ""
    """Start from a pretrained Llama (or Mixtral) in transformers' format: a folder, or a name on
    the hub. Its tokenizer is taken, and its model.*, but for the context to train on (seq_len)."""
    out: Path = Path("checkpoints")
    """Folder for checkpoints, history and plot."""
    seed: int = 0
    """Of the initial weights, the batches, the noise of growth and the samples."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cuda, cuda:1, mps, cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the training step; weights and optimizer are float32. auto: bf16 autocast on
    CUDA and on CPUs that have it natively (AVX512-BF16, AMX)."""
    tracker: Tracker = "none"
    """Show the history's numbers elsewhere too: tensorboard (`pip install tensorboard`) finds them
    in `out`/tensorboard. Where it fails the run goes on without it."""
    resume: bool = False
    """Go on exactly where the run in `out` stopped."""
    overwrite: bool = False
    """Replace what an earlier run left in `out`."""
    dry_run: bool = False
    """Prepare the data, print what would run, phase by phase, and stop."""

    def __post_init__(self) -> None:
        require(
            not (self.resume and self.overwrite), "resume goes on with what overwrite would remove"
        )
        require(
            self.tracker in get_args(Tracker),
            f"tracker = {self.tracker!r} must be one of {', '.join(get_args(Tracker))}",
        )
        require(
            not self.init_from or self.data.tokenizer in ("auto", self.init_from),
            f"data.tokenizer = {self.data.tokenizer}: the model that init_from names has its own",
        )
        require(0 <= self.seed < 2**63, f"seed = {self.seed} must be between 0 and 2^63 - 1")
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
        return self.phases or self.training.phases()


def full() -> Run:
    """64 M dense -> 246 M mixture of experts -> 932 M twice as wide -> 1.15 B deeper. One GPU."""
    return Run()


def tiny() -> Run:
    """All four phases in under a minute on a laptop's CPU, on the built-in stories."""
    model = ModelConfig(
        vocab_size=0, d_model=64, n_layers=3, n_heads=2, d_ff=176, seq_len=128, num_experts=0
    )
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
        eval_tokens=8_192,
        sample_tokens=60,
    )
    return replace(
        full(),
        model=model,
        training=training,
        data=DataConfig(source="builtin", num_stories=8_000),
    )


PRESETS = {preset.__name__: preset for preset in (full, tiny)}
