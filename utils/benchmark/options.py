"""The benchmark's options, which are read before torch is imported."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from config import PRESETS, NonNegativeInt, PositiveInt, check_fields, require

CompileMode = Literal["default", "reduce-overhead"]


@dataclass(frozen=True)
class BenchmarkOptions:
    """Prints tables of the speed and memory of each phase; --json FILE has all figures.

    Measures the training step of each phase as train.py runs it, batches included, and what the
    machine allows: large matrix products and a large copy are timed first. `limit` is the speed of
    a step that does its products at the one rate and moves 38 bytes a parameter at the other.
    Weights are fresh and the text is random token ids, which load the experts more evenly than text
    loads trained ones. The step with data and the step without are timed in turn; models are timed
    one after the other, because together they might not fit."""

    preset: str = "auto"
    """The preset whose phases are measured. `auto` takes full, or on a CPU tiny, whose measurements
    take minutes there and those of full hours."""
    phases: tuple[int, ...] = ()
    """Measure only these phases, by number. Empty measures all of them."""
    batches: tuple[Literal["default"] | int, ...] = ("default", 64)
    """Sequences in a step. `default` is the phase's own batch."""
    steps: bool = True
    """Measure the training step. Without it the baselines on a CPU have the memory allocator as
    their users have it, not as train.py sets it."""
    baselines: bool = False
    """Measure transformers' Llama or Mixtral of the same shape too, in the run's precision on
    float32 parameters and in pure bf16."""
    baseline_compile: tuple[CompileMode, ...] = ()
    """Measure both of these baselines through torch.compile as well, in each of these modes."""
    transitions: bool = False
    """Measure each growth, Adam's moments included, and a mere copy of what it makes."""
    tokenize: Path | None = None
    """Measure how fast this text file becomes tokens."""
    startup: bool = False
    """Measure the time from starting train.py to the end of its first step, with cached tokens."""
    source: str = "builtin"
    """The text that --startup trains on, as for data.source of train.py."""
    tokenizer: str = "auto"
    """The tokenizer of --startup and --tokenize, as for data.tokenizer of train.py."""
    json: Path | None = None
    """Write all that is measured into this .json file, as one object."""
    device: str = "auto"
    """Where to compute: auto (CUDA, then MPS, then CPU), cuda, cuda:1, mps or cpu. Nothing has been
    run on Apple's MPS yet."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the training step, as for precision of train.py."""
    cuda_graph: Literal["auto", "off"] = "auto"
    """Whether the step runs as one CUDA graph, as for training.cuda_graph of train.py. `off`
    launches the step operation by operation; its components are timed as graphs all the same."""
    repeats: PositiveInt = 20
    """Timed runs of each measurement, whose median counts."""
    warm_up: NonNegativeInt = 5
    """Runs before them that do not count. With CUDA graphs the fourth run captures the graph."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.preset in ("auto", *PRESETS),
            f"preset = {self.preset} is not there, only auto, {', '.join(PRESETS)}",
        )
        count = len(PRESETS[self.resolve_preset("cuda")]().schedule)
        require(
            all(1 <= number <= count for number in self.phases),
            f"phases = {self.phases} must be numbers from 1 to {count}",
        )
        require(
            all(size == "default" or size >= 1 for size in self.batches),
            f"batches = {self.batches} must be numbers from 1, or default",
        )
        require(
            not self.baseline_modes or find_spec("transformers") is not None,
            "baselines = True needs the package transformers",
        )
        require(
            self.tokenize is None or self.tokenize.is_file(),
            f"tokenize = {self.tokenize} is not a file",
        )
        out = self.json
        require(
            out is None or (out.suffix == ".json" and out.parent.is_dir() and not out.is_dir()),
            f"json = {out} is no .json file in a folder that is there",
        )
        wanted = self.steps, self.baseline_modes, self.transitions, self.tokenize, self.startup
        require(any(wanted), "steps = False leaves nothing to measure")

    def resolve_preset(self, device_type: str) -> str:
        """Returns the preset that `preset` stands for on a kind of device."""
        usual = "tiny" if device_type == "cpu" else "full"
        return usual if self.preset == "auto" else self.preset

    @property
    def baseline_modes(self) -> list[CompileMode | None]:
        """The modes of torch.compile in which to measure the baselines; None is not compiled."""
        return [*([None] if self.baselines else []), *self.baseline_compile]
