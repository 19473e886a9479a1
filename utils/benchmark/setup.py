"""What all measurements of a benchmark share."""

from dataclasses import dataclass, replace

import torch

from config import PRESETS, Run
from utils.benchmark.options import BenchmarkOptions
from utils.benchmark.timing import Work, time_in_turn
from utils.runtime.device import choose_device, training_dtype
from utils.schedule.phases import ResolvedPhase
from utils.text.tokenizer import LEARNED_VOCAB_SIZE


@dataclass(frozen=True)
class BenchmarkSetup:
    """What all measurements share."""

    options: BenchmarkOptions
    run: Run
    """The preset, with its vocabulary known."""
    device: torch.device
    dtype: torch.dtype
    """The dtype of the training step's matrix products."""

    @classmethod
    def from_options(cls, options: BenchmarkOptions) -> "BenchmarkSetup":
        """Returns the setup for these options, whose device becomes CUDA's current one.

        Raises:
            InputError: for a device that the machine does not have.
        """
        device = choose_device(options.device)
        options = replace(options, preset=options.resolve_preset(device.type))
        preset = PRESETS[options.preset]()
        if device.index is not None:
            torch.cuda.set_device(device)  # whose streams the events and the captured graphs take
        run = replace(
            preset,
            model=replace(preset.model, vocab_size=preset.model.vocab_size or LEARNED_VOCAB_SIZE),
            training=replace(preset.training, cuda_graph=options.cuda_graph),
            precision=options.precision,
        )
        return cls(options, run, device, training_dtype(options.precision, device))

    def has_phase(self, phase: ResolvedPhase) -> bool:
        """Whether a phase is to be measured."""
        return not self.options.phases or phase.number in self.options.phases

    def time(self, *works: Work) -> list[list[float]]:
        """Returns the seconds of each timed run of each of `works`, run in turn."""
        return time_in_turn(works, self.device, self.options.repeats, self.options.warm_up)
