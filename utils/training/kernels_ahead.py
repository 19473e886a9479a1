"""Compiles the Triton kernels of a run's phases beside other work, on all cores at once, before the
first of their steps needs them: one after the other they take a minute.

What is compiled is found out by a training step and an evaluation on tensors without memory, in
which a kernel that would be launched is compiled instead.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from threading import Event

import torch
from tqdm import tqdm

from config import ModelConfig, TrainingConfig
from models import next_token_loss
from models.ops import fused_kernels_available
from transfer import TrainState
from transfer.plan import param_shapes
from utils.optim.adamw import build_optimizer
from utils.runtime.best_effort import BestEffort
from utils.runtime.device import autocast, device_name, use_device
from utils.runtime.threads import start_thread, wait_interruptibly
from utils.schedule.phases import ResolvedPhase
from utils.training.step import train_step

MAX_WAIT_S = 600.0
"""Seconds after which a run has ended, or its first steps take so long that a minute of compiling
is no matter."""


class KernelsAhead:
    """Compiles in a thread, phase after phase, what was not compiled in an earlier run."""

    def __init__(
        self,
        phases: Sequence[ResolvedPhase],
        training: TrainingConfig,
        device: torch.device,
        dtype: torch.dtype,
        eval_batch_size: int,
    ):
        """Begins at once, where the step is made of kernels of this project."""
        self.training, self.device, self.dtype = training, device, dtype
        self.eval_batch_size = eval_batch_size
        self.compiled: dict[int, Future[None]] = {}
        self.may_go_on = Event()
        """Set once the first steps are done, which the compiler would hold up."""
        if training.fused_kernels and not training.low_memory:
            fused = [p for p in phases if fused_kernels_available(p.config, device, dtype)]
            self.compiled = {phase.number: Future() for phase in fused}
            if fused:
                start_thread(lambda: self.compile_phases(fused))

    def wait(self, phase: ResolvedPhase) -> None:
        """Returns once the kernels of a phase are compiled, or could not be."""
        if phase.number not in self.compiled:
            return
        if phase.number != min(self.compiled):
            self.may_go_on.set()
        wait_interruptibly(self.compiled[phase.number])

    def compile_phases(self, phases: Sequence[ResolvedPhase]) -> None:
        """Compiles the kernels of each phase, of all but the first once that takes its steps."""
        compile_phase = BestEffort("compiling kernels ahead", self.compile_phase, tqdm.write)
        try:
            use_device(self.device)
            for phase in phases:
                compile_phase(phase)
                self.compiled[phase.number].set_result(None)
                if not self.may_go_on.wait(MAX_WAIT_S):
                    break
        finally:  # whatever comes, nobody waits for ever
            for future in self.compiled.values():
                if not future.done():
                    future.set_result(None)

    def compile_phase(self, phase: ResolvedPhase) -> None:
        """Compiles the kernels of a phase, unless they lie in Triton's cache."""
        from models.fused.compile import cache_stamp, compile_launches

        # All layers launch what these two do: the first one has nothing to add to the stream yet.
        config = replace(phase.config, n_layers=min(2, phase.config.n_layers))
        sizes = phase.batch_size, self.training.micro_batch_size, self.eval_batch_size
        stamp = cache_stamp(device_name(self.device), self.dtype, config, sizes)
        if stamp.exists():
            return
        with compile_launches():
            self.take_step(config, phase.batch_size)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()

    def take_step(self, config: ModelConfig, batch_size: int) -> None:
        """Calls whatever launches kernels in a step and in evaluations."""
        shapes = param_shapes(config).items()
        weights = {name: torch.empty(shape, device=self.device) for name, shape in shapes}
        optimizer = build_optimizer(TrainState(config, weights), self.training, self.dtype)
        windows = torch.zeros(
            (batch_size, config.seq_len + 1), dtype=torch.int64, device=self.device
        )
        train_step(optimizer, self.training, self.dtype, windows)
        windows = windows[:1].expand(self.eval_batch_size, -1)
        with torch.no_grad(), autocast(self.device, self.dtype):
            next_token_loss(optimizer.model(windows[:, :-1]), windows)
