"""What a run will do, phase by phase, known before it starts: sizes, tokens, work, memory."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from config import InputError, ModelConfig, Phase, Run, TrainingConfig, require
from transfer import plan_for
from utils.device import total_memory_gb, training_dtype

BYTES_PER_PARAMETER = 16
"""Weight, gradient and Adam's two moments, all float32."""


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
    steps, tokens, found = 0, 0, []
    for number, (name, phase) in enumerate(run.schedule.items(), 1):
        try:
            if phase.grow is not None:
                config, _ = plan_for(config, phase.grow)
            check_micro_batch(phase, run.training.micro_batch_size)
        except InputError as error:
            raise InputError(f"phase {number} ({name}): {error}") from None
        found.append(Stage(number, name, phase, config, steps, tokens))
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
    """Of a training step: two per multiply-add, forward and twice that backward; each position of
    causal attention sees half the context on average. Tables that are only looked up do not count.
    """
    looked_up = config.seq_len if config.position == "learned" else 0
    looked_up += 0 if config.tied else config.vocab_size
    matrices = config.num_active_params - looked_up * config.d_model
    attention = config.n_layers * config.n_heads * config.head_dim * config.seq_len
    return 6 * (matrices + attention)


def check_memory(found: list[Stage], run: Run, device: torch.device) -> None:
    """Raises InputError where a phase is expected to need more memory than there is."""
    there, dtype = total_memory_gb(device), training_dtype(run.precision, device)
    for stage in found:
        size, micro = stage.phase.batch_size, run.training.micro_batch_size
        need = memory_gb(stage.config, min(micro or size, size), dtype)
        require(
            there is None or need <= there,
            f"{stage} needs about {need:.1f} GB, {device} has {there or 0:.1f}: a smaller "
            f"training.micro_batch_size than {min(micro or size, size)}, or a smaller model",
        )


def memory_gb(config: ModelConfig, sequences: int, dtype: torch.dtype) -> float:
    """Expected peak of a training step, in 10^9 bytes, `sequences` at a time.

    The multiples were fitted to peaks measured on an H200 in bf16, at 8 (2, 1) and 64 sequences in
    the four phases of the full preset: within 10 % of all eight.
    """
    tokens = sequences * config.seq_len
    experts = config.top_k if config.num_experts else 0
    block = 11 * config.d_model + (experts or 1) * 4 * config.d_ff + experts * 2 * config.d_model
    kept = config.n_layers * block + 3 * config.vocab_size
    return (config.num_params * BYTES_PER_PARAMETER + tokens * kept * dtype.itemsize) / 1e9


def lr_at(step: int, phase: Phase, settings: TrainingConfig) -> float:
    """Linear warm-up, then a cosine down to the floor: every phase warms up anew."""
    warm = round(settings.warmup * phase.steps)
    if step < warm:
        return phase.lr * (step + 1) / warm
    done = (step - warm) / max(1, phase.steps - warm)
    floor = settings.lr_floor
    return phase.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)
