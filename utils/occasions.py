"""What a run does once, timed: starting, making tokens of text, growing."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from config import DataConfig, Run, require
from transfer import State, carry_out, grow, plan_for
from utils.data import prepare
from utils.device import peak_memory_gb, wait_for
from utils.errors import RunStopped
from utils.history import HISTORY
from utils.schedule import Stage
from utils.sources import blocks
from utils.timing import clean_slate

Numbers = dict[str, float | None]
T = TypeVar("T")

TRAIN = Path(__file__).parents[1] / "train.py"
PATIENCE_S = 600.0
"""For the first step of a run."""


def time_growth(
    before: Callable[[], State], stage: Stage, run: Run, device: torch.device, repeats: int
) -> Numbers:
    """Growing into the phase with Adam's moments, alone and with the checks that a run makes, and
    a mere copy of all that it makes. `before` gives the State that the phase grows out of."""
    how = stage.phase.grow
    assert how is not None, f"{stage} grows out of nothing"
    shape_BS = run.training.probe_sequences, stage.config.seq_len + 1
    probe_BS = torch.randint(stage.config.vocab_size, shape_BS, device=device)

    def alone(state: State) -> State:
        config, plan = plan_for(state.config, how)
        return carry_out(config, plan, state, run.seed, consume=True)

    def checked(state: State) -> State:
        return grow(state, how, probe_BS, run.seed, consume=True)[0]

    def tensors(state: State) -> list[Tensor]:
        memory = [tensor for moments in state.adam.values() for tensor in moments.values()]
        return [*state.weights.values(), *memory]

    bare_s, peak = time_each(alone, before, device, repeats)
    checked_s, checked_peak = time_each(checked, before, device, repeats)
    made = tensors(alone(before()))
    copy_s, _ = time_each(
        lambda old: [tensor.clone() for tensor in old], lambda: made, device, repeats
    )

    return {
        "bare_s": bare_s,
        "checked_s": checked_s,
        "copy_s": copy_s,
        "made_gb": sum(tensor.nbytes for tensor in made) / 1e9,
        "peak_memory_gb": peak,
        "checked_peak_memory_gb": checked_peak,
    }


def time_each(
    work: Callable[[T], object], before: Callable[[], T], device: torch.device, repeats: int
) -> tuple[float, float | None]:
    """Median seconds of `work` on what `before` gives, not counting the first, in memory that is
    asked for anew each time; and peak memory of the last."""

    def once() -> float:
        given = before()
        clean_slate(device)
        began = time.perf_counter()
        kept = work(given)
        wait_for(device)
        seconds = time.perf_counter() - began
        del kept
        return seconds

    once()
    return median(once() for _ in range(repeats)), peak_memory_gb(device)


def time_tokens(text: Path, tokenizer: str) -> Numbers:
    """From a text file to tokens on disk, all of it, and opening what is there already."""
    size = sum(len(block.encode()) for block in blocks(text)) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(str(text), tokenizer, num_stories=0, cache=Path(folder))
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            corpus = prepare(data, 0)
            seconds.append(time.perf_counter() - began)
        tokens = len(corpus.train) + len(corpus.valid)
    return {"mb": size, "mb_per_s": size / seconds[0], "tokens": tokens, "open_s": seconds[1]}


def time_startup(preset: str, args: list[str]) -> float:
    """Seconds from starting train.py to the line that it writes after its first step, its tokens
    being on disk. Raises InputError or RunStopped with what it says where it does not come so far.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(TRAIN), preset, *args, "--training.log-every", "1"]
        command += ["--data.cache", f"{folder}/cache", "--out", str(out)]
        dry = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
        require(dry.returncode == 0, f"startup: {last_line(dry.stderr)}")
        said = Path(folder) / "said"
        with said.open("wb") as log:
            began = time.perf_counter()
            child = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                while not stepped(out / HISTORY):
                    seconds = time.perf_counter() - began
                    if child.poll() is not None or seconds > PATIENCE_S:
                        why = last_line(said.read_text(errors="replace"))
                        raise RunStopped(f"startup: no step within {seconds:.0f} s: {why}")
                    time.sleep(0.005)
                return time.perf_counter() - began
            finally:
                child.kill()
                child.wait()


def stepped(history: Path) -> bool:
    return history.exists() and b'"event": "step"' in history.read_bytes()


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]
