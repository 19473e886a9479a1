"""What a run waits for before its first step: making tokens of its text, and starting."""

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from config import DataConfig, require
from utils.benchmark.options import BenchmarkOptions
from utils.benchmark.results import Measurement, ResultRow
from utils.data import prepare_corpus
from utils.metrics.history import HISTORY_FILE
from utils.runtime.errors import RunStopped
from utils.text.sources import read_blocks

TRAIN_SCRIPT = Path(__file__).parents[2] / "train.py"
MAX_STARTUP_S = 600
"""Seconds to wait for a first step."""


def plan_startup(options: BenchmarkOptions) -> Iterator[Measurement]:
    """Yields what to measure of the time before a run's first step, as far as the options ask for
    it."""
    if options.tokenize is not None:
        tokenize = partial(measure_tokenization, options.tokenize, options.tokenizer)
        yield Measurement(f"tokens of {options.tokenize.name}", tokenize)
    if options.startup:
        yield Measurement("start of train.py", partial(measure_startup, options))


def measure_tokenization(text: Path, tokenizer: str) -> Iterator[tuple[str, ResultRow]]:
    """Yields how fast text becomes tokens."""
    yield "tokenize", {"file": text.name, **time_tokenization(text, tokenizer)}


def measure_startup(options: BenchmarkOptions) -> Iterator[tuple[str, ResultRow]]:
    """Yields how soon a run takes its first step."""
    flags = ["--device", options.device, "--precision", options.precision]
    flags += ["--data.source", options.source, "--data.tokenizer", options.tokenizer]
    first_step_s = time_startup(options.preset, flags)
    yield "startup", {"preset": options.preset, "first_step_s": first_step_s}


def time_tokenization(text: Path, tokenizer: str) -> dict[str, float]:
    """Returns how fast a text file, all of it, becomes tokens on disk (`mb_per_s`), and the seconds
    that it takes to open tokens that are there already (`open_s`)."""
    size_mb = sum(len(block.encode()) for block in read_blocks(text)) / 1e6
    with TemporaryDirectory() as cache:
        config = DataConfig(str(text), tokenizer, num_stories=0, cache=Path(cache))
        started = time.perf_counter()
        prepare_corpus(config, 0)
        written = time.perf_counter()
        corpus = prepare_corpus(config, 0)
        opened = time.perf_counter()
        tokens = len(corpus.train) + len(corpus.valid)
    speed = size_mb / (written - started)
    return {"mb": size_mb, "mb_per_s": speed, "tokens": tokens, "open_s": opened - written}


def time_startup(preset: str, flags: list[str]) -> float:
    """Returns the seconds from starting train.py to the history's line after its first step, with
    its tokens on disk.

    Raises:
        InputError: with train.py's own message, if it refuses the flags.
        RunStopped: with its last message, if it does not come so far.
    """
    with TemporaryDirectory() as folder:
        history = Path(folder, "run", HISTORY_FILE)
        command = [sys.executable, str(TRAIN_SCRIPT), preset, *flags, "--training.log-every", "1"]
        command += ["--data.cache", f"{folder}/cache", "--out", f"{folder}/run"]
        dry_run = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
        require(dry_run.returncode == 0, f"startup: {last_line(dry_run.stderr)}")
        started, seconds = time.perf_counter(), 0.0
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            while not has_stepped(history) and process.poll() is None and seconds < MAX_STARTUP_S:
                time.sleep(0.005)
                seconds = time.perf_counter() - started
        finally:
            process.kill()
            _, errors = process.communicate()
        if not has_stepped(history):
            raise RunStopped(f"startup: no step within {seconds:.0f} s: {last_line(errors)}")
        return seconds


def has_stepped(history: Path) -> bool:
    """Whether a history has a line about a training step."""
    return history.exists() and b'"event": "step"' in history.read_bytes()


def last_line(text: str) -> str:
    """Returns the last line of what a program printed."""
    return text.strip().rpartition("\n")[2] or "it printed nothing"
