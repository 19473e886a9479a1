"""Speed and memory of training, phase by phase:  python -m utils.benchmark --peer."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from config import PRESETS, Run, require
from models import SLM, fused
from train import batches, stepper
from transfer import State
from utils.cli import flags, run_command
from utils.cpu import keep_for_next_step
from utils.device import (
    choose_device,
    device_name,
    is_out_of_memory,
    peak_memory_gb,
    training_dtype,
)
from utils.measured import Measured, Row
from utils.meter import Meter, Reading
from utils.occasions import time_growth, time_startup, time_tokens
from utils.optimizer import Optimizer, wake
from utils.output import versions
from utils.peers import Mode, Peer, peer_step, peers
from utils.pieces import pieces
from utils.schedule import Stage, flops_per_token, lr_at, stages
from utils.timing import Rates, Work, captured, clean_slate, measure_rates, timed
from utils.tokens import LEARNED_SIZE

RANDOM_TOKENS = 1 << 20
GROWTHS = 5
"""A growth is timed this often at the most: the model before it is made anew each time."""
PACKAGES = ("transformers", "triton")


@dataclass(frozen=True)
class Benchmark:
    """Measures the training step of each phase as train.py runs it, batches included, and what the
    machine allows: large matrix products and a large copy are timed first. `limit` is the step's
    products at the one rate plus 38 bytes a parameter at the other. Weights are fresh and the text
    is random token ids, by which experts are loaded more evenly than by text once they are trained.
    The step with data and that without are timed in turn; models one after the other, since
    together they might not fit."""

    preset: str = "full"
    """The preset whose phases are measured."""
    phases: tuple[int, ...] = ()
    """Only these, by number; none: all."""
    batches: tuple[Literal["default"] | int, ...] = ("default", 64)
    """Sequences in a step; default: the phase's own."""
    steps: bool = True
    """Measure the training step. Without it peers on a CPU have the memory allocator as their users
    have it, not as train.py sets it."""
    peer: bool = False
    """And that of transformers' Llama or Mixtral: same shapes, in the run's precision over float32
    parameters and in pure bf16."""
    peer_compile: tuple[Mode, ...] = ()
    """Both of them through torch.compile in these modes as well."""
    transitions: bool = False
    """Measure each growth, Adam's moments included, and a mere copy of what it makes."""
    tokenise: Path | None = None
    """Measure how fast this text file becomes tokens."""
    startup: bool = False
    """Measure the time from starting train.py to the end of its first step, with cached tokens."""
    source: str = "builtin"
    """Text for --startup, as --data.source of train.py."""
    tokenizer: str = "auto"
    """For --startup and --tokenise, as --data.tokenizer of train.py."""
    json: Path | None = None
    """Write all that was measured there, as one JSON object."""
    device: str = "auto"
    """As of train.py."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """As of train.py."""
    capture: Literal["auto", "off"] = "auto"
    """As training.capture of train.py; off: the step is launched operation by operation (its parts
    are timed as graphs all the same)."""
    repeats: int = 20
    """Timed runs of each piece of work; their median counts."""
    warm_up: int = 5
    """Runs before them that do not count."""

    def __post_init__(self) -> None:
        require(
            self.preset in PRESETS,
            f"preset = {self.preset} is not there, only {', '.join(PRESETS)}",
        )
        count = len(PRESETS[self.preset]().schedule)
        for number in self.phases:
            require(1 <= number <= count, f"phases = {number} is not between 1 and {count}")
        for size in self.batches:
            require(size == "default" or size >= 1, f"batches = {size} must be at least 1")
        require(self.repeats >= 1, f"repeats = {self.repeats} must be at least 1")
        require(self.warm_up >= 0, f"warm_up = {self.warm_up} must not be negative")
        text, out = self.tokenise, self.json
        require(text is None or text.is_file(), f"tokenise = {text} is not a file")
        require(
            out is None or (out.parent.is_dir() and out.suffix == ".json" and not out.is_dir()),
            f"json = {out} is no .json file in a folder that is there",
        )
        wanted = (self.steps, self.peer, self.peer_compile, self.transitions, text, self.startup)
        require(any(wanted), "steps = False leaves nothing to measure")


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    options: Benchmark
    run: Run
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, options: Benchmark) -> "Bench":
        run, device = PRESETS[options.preset](), choose_device(options.device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # whose streams the events and the captured graphs take
        model = replace(run.model, vocab_size=run.model.vocab_size or LEARNED_SIZE)
        training = replace(run.training, capture=options.capture)
        run = replace(run, model=model, training=training, precision=options.precision)
        return cls(options, run, device, training_dtype(options.precision, device))

    def timed(self, *works: Work) -> list[list[float]]:
        return timed(works, self.device, self.options.repeats, self.options.warm_up)

    def rates(self) -> Rates:
        small, options = self.device.type == "cpu", self.options
        return measure_rates(self.device, self.dtype, options.repeats, options.warm_up, small)

    def stages(self) -> list[Stage]:
        """Those to measure, at each of the batches."""
        found = []
        for stage in filter(self.wants, stages(self.run)):
            own = stage.phase.batch_size
            for size in dict.fromkeys(own if b == "default" else b for b in self.options.batches):
                found.append(replace(stage, phase=replace(stage.phase, batch_size=size)))
        return found

    def wants(self, stage: Stage) -> bool:
        return not self.options.phases or stage.number in self.options.phases


class Training(NamedTuple):
    """A model in training."""

    step: Work
    """The next training step on the next batch."""
    again: Work
    """One on a batch that is there already."""
    optimizer: Optimizer


def training(stage: Stage, run: Run, device: torch.device, dtype: torch.dtype) -> Training:
    """A fresh model of the phase, trained on random tokens by train.py's own step and batches."""
    torch.manual_seed(run.seed)
    with torch.device(device):
        state = State.of(SLM(stage.config))
    optimizer = wake(state, run.training, dtype, stage.growth)
    meter = Meter(device, stage.tokens_per_step, Reading.nothing())
    step = stepper(optimizer, run.training, dtype, sys.maxsize)
    vocab_size = stage.config.vocab_size
    dtype_on_disk = np.uint16 if vocab_size <= 2**16 else np.uint32
    text = np.random.default_rng(run.seed).integers(vocab_size, size=RANDOM_TOKENS)
    endless = replace(stage, phase=replace(stage.phase, steps=sys.maxsize))
    stream = batches(text.astype(dtype_on_disk), endless, run.seed, device)
    still = next(stream)

    def train(tokens: Tensor) -> None:
        optimizer.set_lr(lr_at(0, stage, run.training))
        meter.add(step(tokens))

    return Training(lambda: train(next(stream)), lambda: train(still), optimizer)


def speed(
    row: Row, stage: Stage, make: Callable[[], Sequence[Work]], rates: Rates, bench: Bench
) -> Row:
    """`row` with the time and memory of the step that `make` makes and, where it makes a second
    that spares the making of batches, with the time of that, taken in turn with the first."""
    tokens = stage.tokens_per_step
    row |= {"phase": stage.number, "name": stage.name, "batch": stage.phase.batch_size}
    row |= {"context": stage.config.seq_len, "params": stage.config.num_params}
    row |= {"active_params": stage.config.num_active_params}
    limit_s = rates.limit_s(stage.config, tokens)
    row |= {"limit_tokens_per_s": tokens / limit_s}
    clean_slate(bench.device)
    try:
        step, *spared = bench.timed(*make())
    except RuntimeError as error:
        return row | no_memory(error)
    flops, seconds = tokens * flops_per_token(stage.config), median(step)
    without = {"ms_without_data": 1e3 * median(spared[0])} if spared else {}
    return row | {
        "ms": 1e3 * seconds,
        "ms_min": 1e3 * min(step),
        "ms_max": 1e3 * max(step),
        **without,
        "tokens_per_s": tokens / seconds,
        "mfu": flops / seconds / rates.flops_per_s,
        "of_limit": limit_s / seconds,
        "peak_memory_gb": peak_memory_gb(bench.device),
    }


def own_step(stage: Stage, rates: Rates, bench: Bench) -> dict[str, Row]:
    """Rows of this project's step and, where it could be measured, of its parts."""
    awake: list[Training] = []

    def make() -> Sequence[Work]:
        awake.append(training(stage, bench.run, bench.device, bench.dtype))
        return awake[0].step, awake[0].again

    row = speed({"model": "this project"}, stage, make, rates, bench)
    if "ms" not in row:
        return {"steps": row}
    parts: Row = {name: row[name] for name in ("phase", "name", "batch")}
    try:
        parts |= parts_of(awake[0], stage, cast("float", row["ms"]), rates, bench)
    except RuntimeError as error:
        parts |= no_memory(error)
    return {"steps": row, "parts": parts}


def peer_row(peer: Peer, stage: Stage, rates: Rates, bench: Bench) -> Row:
    settings, size = bench.run.training, stage.phase.batch_size

    def make() -> Sequence[Work]:
        return [peer_step(peer, stage.config, size, settings, bench.device, bench.dtype)]

    row: Row = {"model": peer.label(stage.config, bench.dtype)}
    return speed(row, stage, make, rates, bench)


def parts_of(awake: Training, stage: Stage, step_ms: float, rates: Rates, bench: Bench) -> Row:
    """Of each part the time, its part of the limit, and its share of the step. Each is timed alone,
    on CUDA without the time to launch it and with the gradients of its own weights, which the step
    makes for all blocks together: they may add up to more than the step, though norms, embedding
    and data are in none of them."""
    work = pieces(awake.optimizer, stage.phase.batch_size, bench.dtype)
    if fused.available(bench.device, bench.dtype):
        work = {name: captured(work[name], bench.device) for name in work}
    row: Row = {}
    for name, limit_s in rates.parts_s(stage.config, stage.tokens_per_step).items():
        ms = 1e3 * median(bench.timed(work[name])[0])
        row |= {f"{name}_ms": ms, f"{name}_limit_ms": 1e3 * limit_s, f"{name}_share": ms / step_ms}
    return row


def transition(before: Stage, after: Stage, bench: Bench) -> Row:
    def at_rest() -> State:
        awake = training(before, bench.run, bench.device, bench.dtype)
        awake.step()
        return awake.optimizer.rest()

    row: Row = {"name": f"{before.name} -> {after.name}"}
    repeats = min(GROWTHS, bench.options.repeats)
    try:
        return row | time_growth(at_rest, after, bench.run, bench.device, repeats)
    except RuntimeError as error:
        return row | no_memory(error)


def no_memory(error: RuntimeError) -> Row:
    """What a row says in place of what could not be measured. Raises any other `error` again."""
    if not is_out_of_memory(error):
        raise error
    return {"error": "out of memory"}


def machine(bench: Bench) -> Row:
    cuda = bench.device.type == "cuda"
    return {
        "device": device_name(bench.device),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda if cuda else None,
        **versions(),
        **{name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(options: Benchmark) -> None:
    if options.steps or options.transitions:
        keep_for_next_step()
    bench = Bench.of(options)
    rivals = peers(options.peer, options.peer_compile)
    found = bench.stages() if options.steps or rivals else []
    measured = Measured(options.json, options=asdict(options), machine=machine(bench))
    if found:
        rates = bench.rates()
        measured.add("rates", rates._asdict())
        for stage in found:
            if options.steps:
                for kind, row in own_step(stage, rates, bench).items():
                    measured.add(kind, row)
            for peer in rivals:
                measured.add("steps", peer_row(peer, stage, rates, bench))
    if options.transitions:
        for before, after in pairwise(stages(bench.run)):
            if after.phase.grow is not None and bench.wants(after):
                measured.add("transitions", transition(before, after, bench))
    if options.tokenise is not None:
        row: Row = {"file": str(options.tokenise)}
        measured.add("tokenise", row | time_tokens(options.tokenise, options.tokenizer))
    if options.startup:
        args = ["--device", options.device, "--precision", options.precision]
        args += ["--data.source", options.source, "--data.tokenizer", options.tokenizer]
        seconds = time_startup(options.preset, args)
        measured.add("startup", {"preset": options.preset, "first_step_s": seconds})
    print(f"\n{measured}")


if __name__ == "__main__":
    run_command(
        lambda: main(
            flags(
                Benchmark,
                sys.argv[1:],
                default=Benchmark(),
                prog="python -m utils.benchmark",
                description=Benchmark.__doc__ or "",
            )
        )
    )
