"""What a run will do, phase by phase, known before it starts: sizes, tokens, work, memory."""

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from config import Growth, InputError, ModelConfig, Phase, Run, TrainingConfig, require
from models import fused
from transfer import plan_for
from utils.device import free_memory_gb, small_workspaces, training_dtype

BYTES = 16
"""Of a parameter: weight, gradient and Adam's two moments, all float32."""
FUSED_BYTES = 14
"""The weight in two halves of 2, the gradient in bf16, two moments in float32."""
SPLIT_BYTES = 8
"""What splitting the largest weight takes as a phase begins: there is no gradient yet, but all the
others are still whole."""
HELD = 1.75
"""Of a CPU's memory, since freed buffers and kernels are kept, those of the phase before as well:
the full preset's first two phases held 1.5 to 1.75 times what they had in use."""
USABLE = 0.95
"""Share of the memory that a run may be expected to need: what is expected may be off, and what is
free lies in pieces."""
LEAN_BYTES = 7.125
"""Weight and gradient in bf16, 8 more bits of the weight, two moments of 8 bits with scales."""


@dataclass(frozen=True)
class Stage:
    """A phase in its place: what it trains and what came before it."""

    number: int
    name: str
    phase: Phase
    config: ModelConfig
    first_step: int
    """Optimizer steps before this phase."""
    first_token: int
    """Training tokens before this phase."""
    lr_end: float
    """What the learning rate decays to."""
    growth: tuple[Growth, ...] = ()
    """Every operator that its model has been through, in order."""

    @property
    def tokens_per_step(self) -> int:
        return self.phase.batch_size * self.config.seq_len

    @property
    def tokens(self) -> int:
        return self.phase.steps * self.tokens_per_step

    def tokens_at(self, step: int) -> int:
        """Training tokens of the whole run after this many steps of this phase."""
        return self.first_token + step * self.tokens_per_step

    @property
    def checkpoint(self) -> str:
        return self.phase.checkpoint or f"{self.name}_final.pt"

    @property
    def files(self) -> list[str]:
        """What the phase leaves in the run's folder."""
        init = self.phase.init_checkpoint
        return [init, self.checkpoint] if init else [self.checkpoint]

    @property
    def flops(self) -> int:
        return self.tokens * flops_per_token(self.config)

    def __str__(self) -> str:
        return f"phase {self.number} ({self.name})"


def stages(run: Run) -> list[Stage]:
    """Raises InputError, naming the phase, where a growth or a batch does not fit its model."""
    # A vocabulary still to be learned (0) has no bearing on whether the phases fit together.
    config = replace(run.model, vocab_size=run.model.vocab_size or 1)
    phases = list(run.schedule.values())
    steps, tokens, growth, found = 0, 0, (), []
    for number, (name, phase) in enumerate(run.schedule.items(), 1):
        try:
            if phase.grow is not None:
                config, _ = plan_for(config, phase.grow)
                growth = (*growth, phase.grow)
            check_micro_batch(phase, run.training.micro_batch_size)
        except InputError as error:
            raise InputError(f"phase {number} ({name}): {error}") from None
        after = next((later for later in phases[number:] if later.steps), None)
        end = lr_end(phase, after, run.training)
        found.append(Stage(number, name, phase, config, steps, tokens, end, growth))
        steps, tokens = steps + phase.steps, tokens + found[-1].tokens
    check_files(found)
    return found


def check_files(found: list[Stage]) -> None:
    """Each phase has checkpoints of its own, by plain names."""
    taken: dict[str, Stage] = {}
    for stage in found:
        for name in stage.files:
            plain = name == Path(name).name and name.endswith(".pt")
            require(plain, f"{stage}: checkpoint = {name} is not a file name that ends in .pt")
            other = taken.setdefault(name, stage)
            require(other is stage, f"{stage}: checkpoint = {name} is also that of {other}")


def check_micro_batch(phase: Phase, micro: int | None) -> None:
    require(
        micro is None or micro >= phase.batch_size or phase.batch_size % micro == 0,
        f"training.micro_batch_size = {micro} does not divide the batch of {phase.batch_size}",
    )


def flops_per_token(config: ModelConfig) -> int:
    """Of a training step: two per multiply-add, forward and twice that backward. Tables that are
    only looked up do not count."""
    looked_up = config.seq_len if config.position == "learned" else 0
    looked_up += 0 if config.tied else config.vocab_size
    matrices = config.num_active_params - looked_up * config.d_model
    return 6 * (matrices + attended(config))


def attended(config: ModelConfig) -> int:
    """Multiply-adds of a token with those that it attends to: scores, then values, each position
    seeing half the context on average."""
    return config.n_layers * config.n_heads * config.head_size * config.seq_len


def choose_step(run: Run, found: list[Stage], device: torch.device) -> None:
    """Settles how this process computes the steps of the run; to be called before the first
    product. Raises InputError, naming what is missing, where the lean optimizer or a captured step
    is wanted and cannot be had."""
    settings, dtype = run.training, training_dtype(run.precision, device)
    served = all(fused.serves(stage.config) for stage in found)
    needs = {
        "a CUDA device": device.type == "cuda",
        "Triton": fused.has_triton(),
        "precision = bf16": dtype == torch.bfloat16,
        "training.fused": settings.fused,
        "model.d_model and model.d_ff in multiples of 8": served,
    }
    missing = [what for what, there in needs.items() if not there]
    for name, wanted in (("lean", settings.lean), ("capture", settings.capture == "on")):
        value = getattr(settings, name)
        require(
            not (wanted and missing), f"training.{name} = {value} needs {' and '.join(missing)}"
        )
    require(
        not settings.lean or find_spec("flashoptim") is not None,
        "training.lean = True needs a library: pip install flashoptim==0.1.4",
    )
    require(
        not (settings.lean and settings.capture == "on"),
        "training.capture = on needs training.lean = False, whose library takes rates as constants",
    )
    fused.enabled = settings.fused and served
    if settings.lean:
        small_workspaces()


def check_memory(found: list[Stage], run: Run, device: torch.device) -> None:
    """Raises InputError where a phase is expected to need more memory than there is, and says what
    would make all of them fit."""

    def most(**changes: object) -> tuple[float, Stage]:
        """By the phase that needs it."""
        changed = replace(run, training=replace(run.training, **changes))
        needs = [(stage_memory_gb(stage, changed, device), stage) for stage in found]
        return max(needs, key=lambda each: each[0])

    (need, stage), there = most(), free_memory_gb(device)
    if there is None or need <= USABLE * there:
        return
    smaller: dict[str, dict[str, object]] = {
        "--training.micro-batch-size 1": {"micro_batch_size": 1}
    }
    if fused.available(device, training_dtype(run.precision, device)):
        smaller["--training.lean"] = {"lean": True}
        smaller[" ".join(smaller)] = {"lean": True, "micro_batch_size": 1}
    fits = [
        f"{flags} needs {less:.1f} GB"
        for flags, changes in smaller.items()
        if (less := most(**changes)[0]) <= USABLE * there
    ]
    raise InputError(
        f"{stage} needs about {need:.1f} GB, {device} has {there:.1f}: "
        + (fits[0] if fits else "only a smaller model would fit")
    )


def stage_memory_gb(stage: Stage, run: Run, device: torch.device) -> float:
    settings, size = run.training, stage.phase.batch_size
    dtype = training_dtype(run.precision, device)
    lean = settings.fused and settings.lean
    plain = not (settings.fused and fused.available(device, dtype))
    at_once = min(settings.micro_batch_size or size, size)
    in_use = memory_gb(stage.config, at_once, dtype, lean, plain)
    return HELD * in_use if device.type == "cpu" else in_use


def memory_gb(
    config: ModelConfig,
    sequences: int,
    dtype: torch.dtype,
    lean: bool = False,
    plain: bool = True,
) -> float:
    """Expected peak of a phase, in 10^9 bytes, `sequences` at a time; `plain` without the fused
    kernels.

    The multiples were fitted to peaks measured in bf16, plain on an H200 and fused on an H100, at 8
    (2, 1) and 64 sequences in the four phases of the full preset: within 10 % of all.
    """
    tokens = sequences * config.seq_len
    choices = config.top_k if config.num_experts else 0
    width, inner = config.d_model, (choices or 1) * config.d_ff
    if plain:
        block, head = 11 * width + 4 * inner + 2 * choices * width, 3 * config.vocab_size
    else:
        block, head = 8 * width + 3 * inner, 1.25 * config.vocab_size
        # Once the logits are gone: the slopes that all weights' gradients are made of together.
        late = 4 * width if choices else 5 * width + 2 * inner
        head = max(head, config.n_layers * late)
    kept = tokens * (config.n_layers * block + head) * dtype.itemsize
    each = LEAN_BYTES if lean else BYTES if plain else FUSED_BYTES
    if not lean and not plain:
        largest = width * max(config.vocab_size, (config.num_experts or 1) * config.d_ff)
        kept = max(kept, SPLIT_BYTES * largest)
    return (config.num_params * each + kept) / 1e9


def lr_end(phase: Phase, after: Phase | None, settings: TrainingConfig) -> float:
    """What the learning rate decays to in a phase, `after` being the next one that trains."""
    floor = settings.lr_floor * phase.lr
    if after is None or settings.anneal == "each":
        return floor
    return max(floor, min(phase.lr, after.lr))


def lr_at(step: int, stage: Stage, settings: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine down: every phase warms up anew, but one that grew where
    growing only resets Adam."""
    phase = stage.phase
    cold = phase.grow is not None and settings.at_growth == "reset"
    warm = 0 if cold else round(settings.warmup * phase.steps)
    if step < warm:
        return phase.lr * (step + 1) / warm
    done = (step - warm) / max(1, phase.steps - warm)
    return stage.lr_end + (phase.lr - stage.lr_end) * (1 + math.cos(math.pi * done)) / 2
