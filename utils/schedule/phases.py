"""What a run will do, phase by phase, known before it starts: sizes, tokens and work."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from config import Growth, InputError, ModelConfig, Phase, Run, TrainingConfig, require
from models.ops import has_triton, supports_fused_kernels
from transfer import make_plan
from utils.runtime.device import shrink_cublas_workspaces, training_dtype


@dataclass(frozen=True)
class ResolvedPhase:
    """A phase in its place: what config.Phase says, and what follows from the phases before it."""

    number: int
    """Position in the schedule, from 1."""
    name: str
    config: ModelConfig
    """The model that is trained, after this phase's growth."""
    growth: Growth | None
    """The operator that grows the model before this phase."""
    growth_history: tuple[Growth, ...]
    """Every operator that the model has been through, this phase's included."""
    steps: int
    batch_size: int
    lr: float
    """Peak learning rate."""
    final_lr: float
    """Where the learning rate ends."""
    checkpoint: str
    """File name of the trained model."""
    init_checkpoint: str
    """File name of the grown model before training; empty for none."""
    first_step: int
    """Optimizer steps of the run before this phase."""
    first_token: int
    """Training tokens of the run before this phase."""
    done_steps: int = 0
    """Optimizer steps of this phase before the run was resumed."""
    done_tokens: int = 0
    """Training tokens of those steps, whose batches may have had another size."""
    is_done: bool = False
    """Whether it was over before the run was resumed: settings now may not be those it had."""

    @property
    def tokens_per_step(self) -> int:
        """Training tokens in each optimizer step."""
        return self.batch_size * self.config.seq_len

    @property
    def tokens(self) -> int:
        """Training tokens of the phase."""
        return self.tokens_at(self.steps) - self.first_token

    def tokens_at(self, step: int) -> int:
        """Returns the training tokens of the whole run after `step` steps of this phase."""
        new_tokens = (step - self.done_steps) * self.tokens_per_step
        return self.first_token + self.done_tokens + new_tokens

    @property
    def checkpoint_files(self) -> list[str]:
        """Names of the checkpoints that the phase leaves in the run's folder."""
        return [name for name in (self.init_checkpoint, self.checkpoint) if name]

    def __str__(self) -> str:
        return f"phase {self.number} ({self.name})"


def resolve_phases(run: Run, growth_history: tuple[Growth, ...] = ()) -> list[ResolvedPhase]:
    """Returns the run's phases in order. `growth_history` is what the model that it starts from has
    been through.

    Raises:
        InputError: if a growth or a batch does not fit its model; the message names the phase.
    """
    # A vocabulary still to be learned (0) has no bearing on whether the phases fit together.
    config = replace(run.model, vocab_size=run.model.vocab_size or 1)
    schedule = list(run.schedule.values())
    steps, tokens, phases = 0, 0, []
    for number, (name, phase) in enumerate(run.schedule.items(), 1):
        try:
            if phase.growth is not None:
                config, _ = make_plan(config, phase.growth)
                growth_history = (*growth_history, phase.growth)
            check_micro_batch(phase, run.training.micro_batch_size)
        except InputError as error:
            raise InputError(f"phase {number} ({name}): {error}") from None
        next_trained = next((later for later in schedule[number:] if later.steps), None)
        resolved = ResolvedPhase(
            number=number,
            name=name,
            config=config,
            growth=phase.growth,
            growth_history=growth_history,
            steps=phase.steps,
            batch_size=phase.batch_size,
            lr=phase.lr,
            final_lr=final_lr(phase, next_trained, run.training),
            checkpoint=phase.checkpoint or f"{name}_final.pt",
            init_checkpoint=phase.init_checkpoint,
            first_step=steps,
            first_token=tokens,
        )
        phases.append(resolved)
        steps, tokens = steps + phase.steps, tokens + resolved.tokens
    check_file_names(phases)
    return phases


def resume_phases(
    phases: list[ResolvedPhase], number: int, step: int, first_token: int, tokens: int
) -> list[ResolvedPhase]:
    """Returns the phases of a run that goes on after `step` steps of phase `number`.

    Args:
        phases: All phases, as the settings from here on have them.
        number: The phase under way.
        step: Its optimizer steps so far.
        first_token: Training tokens before it.
        tokens: Training tokens of the whole run so far.
    """
    *past, current = phases[:number]
    resumed = [
        replace(current, first_token=first_token, done_steps=step, done_tokens=tokens - first_token)
    ]
    for phase in phases[number:]:
        before = resumed[-1]
        resumed.append(replace(phase, first_token=before.tokens_at(before.steps)))
    return [*(replace(phase, is_done=True) for phase in past), *resumed]


def setting_phases(setting: str, phases: Sequence[ResolvedPhase]) -> Sequence[ResolvedPhase]:
    """Returns the phases in whose training a setting has a part, given its dotted name."""
    if match := re.fullmatch(r"training\.\w+_phase(\d)", setting):
        return [phase for phase in phases if phase.number == int(match[1])]
    if setting == "training.batch_size":
        return phases[:2]
    if match := re.fullmatch(r"phases\.(.+)\.\w+", setting):
        return [phase for phase in phases if phase.name == match[1]]
    return phases


def lr_option(phase: ResolvedPhase, run: Run) -> str:
    """Returns the option that sets a phase's peak learning rate."""
    return f"--phases.{phase.name}.lr" if run.phases else f"--training.lr-phase{phase.number}"


def final_lr(phase: Phase, next_trained: Phase | None, training: TrainingConfig) -> float:
    """Returns the learning rate at the end of a phase, `next_trained` being the next phase that
    trains."""
    floor = training.min_lr_ratio * phase.lr
    if next_trained is None or training.decay_to == "floor":
        return floor
    return max(floor, min(phase.lr, next_trained.lr))


def check_file_names(phases: list[ResolvedPhase]) -> None:
    """Raises InputError unless each phase has checkpoints of its own, with plain .pt names."""
    owners: dict[str, ResolvedPhase] = {}
    for phase in phases:
        for name in phase.checkpoint_files:
            is_plain = name == Path(name).name and name.endswith(".pt")
            require(is_plain, f"{phase}: checkpoint = {name} is not a file name that ends in .pt")
            owner = owners.setdefault(name, phase)
            require(owner is phase, f"{phase}: checkpoint = {name} is also that of {owner}")


def check_micro_batch(phase: Phase, micro_batch_size: int | None) -> None:
    """Raises InputError if the micro-batch does not divide the phase's batch."""
    size = phase.batch_size
    require(
        micro_batch_size is None or micro_batch_size >= size or size % micro_batch_size == 0,
        f"training.micro_batch_size = {micro_batch_size} does not divide the batch of {size}",
    )


def flops_per_token(config: ModelConfig) -> int:
    """Returns the floating-point operations of a training step per token: two per multiply-add,
    forward and twice that backward (arXiv:2204.02311, appendix B). Tables that are only looked up
    do not count."""
    rows = config.seq_len if config.position_embedding == "learned" else 0
    rows += 0 if config.tie_embeddings else config.vocab_size
    matrix_params = config.num_active_params - rows * config.d_model
    return 6 * (matrix_params + attention_macs(config))


def attention_macs(config: ModelConfig) -> int:
    """Returns a token's multiply-adds with those it attends to, scores and values, over all layers:
    a position sees half the context on average."""
    return config.n_layers * config.n_heads * config.head_size * config.seq_len


def check_step_options(run: Run, phases: list[ResolvedPhase], device: torch.device) -> None:
    """Raises InputError, naming what is missing, where the low-memory optimizer or a CUDA graph is
    asked for and cannot be had. Call it before the first product on the device."""
    training, dtype = run.training, training_dtype(run.precision, device)
    needs = {
        "a CUDA device": device.type == "cuda",
        "Triton": has_triton(),
        "precision = bf16": dtype == torch.bfloat16,
        "training.fused_kernels": training.fused_kernels,
        "model.d_model and model.d_ff in multiples of 8": all(
            supports_fused_kernels(phase.config) for phase in phases
        ),
    }
    missing = [need for need, is_there in needs.items() if not is_there]
    wants_graph = training.cuda_graph == "on"
    for name, is_wanted in (("low_memory", training.low_memory), ("cuda_graph", wants_graph)):
        require(
            not (is_wanted and missing),
            f"training.{name} = {getattr(training, name)} needs {' and '.join(missing)}",
        )
    require(
        not training.low_memory or find_spec("flashoptim") is not None,
        "training.low_memory = True needs a library: pip install flashoptim==0.1.4",
    )
    require(
        not (training.low_memory and wants_graph),
        "training.cuda_graph = on needs training.low_memory = False, whose library takes rates as "
        "constants",
    )
    if training.low_memory:
        shrink_cublas_workspaces()
