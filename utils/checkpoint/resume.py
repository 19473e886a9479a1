"""Points to resume from: kept beside a run's output while it lasts, so that it can go on
exactly."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from config import InputError, ModelConfig, Run, require
from transfer import TrainState
from utils.checkpoint.model import check_weights
from utils.metrics.history import HISTORY_FILE, PLOT_FILE, History
from utils.metrics.throughput import AccumulatorState
from utils.runtime.atomic_io import load_tensors, save_tensors
from utils.runtime.device import on_cpu
from utils.runtime.errors import RunStopped
from utils.schedule.phases import ResolvedPhase

RESUME_FOLDER = "resume"
RESUME_SCHEMA = 2
KEPT_POINTS = 2
CHANGEABLE = (
    "data.", "device", "dry_run", "init_from", "out", "overwrite", "precision", "resume",
    "tracker", "training.checkpoint_every", "training.cuda_graph", "training.fused_kernels",
    "training.low_memory", "training.micro_batch_size",
)  # fmt: skip
"""Settings that may change between a run and its resumption, by the start of their names. (The
tokens themselves and what the run started from may not.)"""
TOLERANCE = ".tolerance."
"""Tolerances may change too: they train nothing, and who meets one may want a wider one."""


class TrainingProgress(NamedTuple):
    """A point of a run between two optimizer steps, before anything is logged or evaluated after
    the first of them: going on from here does what the run would have done."""

    phase: int
    """Number of the phase; 0 before the first."""
    step: int
    """Optimizer steps done in the phase."""
    metrics: AccumulatorState
    """What has been measured since the last line of the history."""
    history_bytes: int
    """Length of the history so far."""
    phase_started_s: float
    """Seconds that the run had taken when the phase began, its growth included."""

    @classmethod
    def start_of(
        cls, phase: int, history_bytes: int = 0, phase_started_s: float = 0.0
    ) -> "TrainingProgress":
        """Returns the point before the first step of a phase."""
        return cls(phase, 0, AccumulatorState.empty(), history_bytes, phase_started_s)

    def is_inside(self, phase: ResolvedPhase) -> bool:
        """Whether `phase` had begun: its growth is done."""
        return self.phase == phase.number

    @property
    def file_name(self) -> str:
        """Name of the resume point's file; names sort by time."""
        return f"phase{self.phase:03d}-step{self.step:08d}.pt"


@dataclass(frozen=True)
class RunFingerprint:
    """What a run must have in common with the one that it continues."""

    settings: dict[str, object]
    corpus: str
    """Fingerprint of the tokens."""
    device: str
    threads: int

    def differences(self, other: "RunFingerprint") -> list[str]:
        """Returns one phrase for each setting that `other` has otherwise."""
        names = sorted(self.settings.keys() | other.settings.keys())
        pairs = [(name, self.settings.get(name), other.settings.get(name)) for name in names]
        pairs.append(("corpus (fingerprint)", self.corpus, other.corpus))
        return [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]


def run_fingerprint(
    run: Run, corpus: str, device: torch.device, init_source: str = ""
) -> RunFingerprint:
    """Returns a run's fingerprint, given those of its tokens and of the model it starts from (empty
    for random weights)."""
    settings = {
        name: value
        for name, value in flatten_settings(asdict(run)).items()
        if not name.startswith(CHANGEABLE) and TOLERANCE not in name
    }
    if init_source:
        settings["init_from (fingerprint)"] = init_source
    return RunFingerprint(settings, corpus, device.type, torch.get_num_threads())


def flatten_settings(values: dict, prefix: str = "") -> dict[str, object]:
    """Flattens nested settings: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        nested = flatten_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{name}": value} if nested is None else nested
    return flat


class ResumeCheckpointer:
    """Keeps a point to resume from every so often, at the end of each phase, and when told to.

    No random generator runs through the training (batches, growth and samples each draw from one of
    their own, seeded by the run's seed and an index), so there is none to be kept.
    """

    def __init__(
        self,
        run: Run,
        fingerprint: RunFingerprint,
        history: History,
        kept: TrainingProgress | None = None,
    ):
        """`kept` is the progress of which there is a resume point already."""
        self.out, self.fingerprint, self.history = run.out, fingerprint, history
        every = run.training.checkpoint_every
        self.every_steps = None if every.endswith("min") else int(every)
        self.every_s = 60.0 * int(every.removesuffix("min"))
        self.last_file = kept.file_name if kept else ""
        self.last_time = time.perf_counter()

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether a point is to be kept after `step` of a phase that ends with `last_step`."""
        if self.every_steps is None:
            is_time = time.perf_counter() - self.last_time > self.every_s
            return step == last_step or is_time
        return step == last_step or step % self.every_steps == 0 < step

    def has(self, progress: TrainingProgress) -> bool:
        """Whether the last point that was kept, or resumed from, is this one."""
        return progress.file_name == self.last_file

    def keep(self, progress: TrainingProgress, state: TrainState) -> None:
        """Writes a point, then removes all but the last KEPT_POINTS.

        Raises:
            OSError: if it cannot be written.
            RunStopped: if a weight is no longer finite.
        """
        if self.has(progress):
            return
        is_finite = torch.stack([weight.isfinite().all() for weight in state.weights.values()])
        if not is_finite.all():
            name = list(state.weights)[int(is_finite.int().argmin())]
            raise RunStopped(f"phase {progress.phase}, step {progress.step}: {name} is not finite")
        self.history.sync()
        metrics = progress.metrics._asdict() | {"sums": progress.metrics.sums.cpu()}
        content = {
            "schema": RESUME_SCHEMA,
            **asdict(self.fingerprint),
            **progress._asdict(),
            "metrics": metrics,
            "config": asdict(state.config),
            "weights": on_cpu(state.weights),
            "adam": {name: on_cpu(moments) for name, moments in state.adam.items()},
        }
        save_tensors(self.out / RESUME_FOLDER / progress.file_name, content, zip_sums=False)
        self.last_file, self.last_time = progress.file_name, time.perf_counter()
        for old in resume_points(self.out)[:-KEPT_POINTS]:
            old.unlink()


def resume_points(out: Path) -> list[Path]:
    """Returns the files of a run's resume points, oldest first."""
    return sorted((out / RESUME_FOLDER).glob("phase*-step*.pt"))


def latest_point(
    out: Path, fingerprint: RunFingerprint, warn: Callable[[str], None]
) -> tuple[TrainingProgress, TrainState] | None:
    """Returns the last point that is whole; None where none was ever kept.

    Raises:
        InputError: if all points are damaged, or if they are of another run.
    """
    files = resume_points(out)
    for path in reversed(files):
        try:
            content = load_tensors(path)
            require(content.get("schema") == RESUME_SCHEMA, f"{path} is of another schema")
            kept = RunFingerprint(**{name: content[name] for name in asdict(fingerprint)})
            point = unpack_point(path, content)
        except (InputError, KeyError, TypeError, AttributeError) as error:
            warn(f"{path} cannot be used ({error}); trying the one before")
            continue
        if differences := kept.differences(fingerprint):
            raise InputError(f"{out} holds another run: {'; '.join(differences)}")
        if (kept.device, kept.threads) != (fingerprint.device, fingerprint.threads):
            warn(
                f"kept on {kept.device} with {kept.threads} threads, going on on "
                f"{fingerprint.device} with {fingerprint.threads}: not bit for bit"
            )
        return point
    where = out / RESUME_FOLDER
    require(not files, f"none of the points in {where} is whole: there is nothing to resume")
    return None


def unpack_point(path: Path, content: dict) -> tuple[TrainingProgress, TrainState]:
    """Returns what a resume point holds. Raises InputError, KeyError or TypeError where it is not
    what a run would have written."""
    config = ModelConfig.from_dict(content["config"])
    state = TrainState(config, content["weights"], content["adam"])
    check_weights(path, config, state.weights)
    content["metrics"] = AccumulatorState(**content["metrics"])
    return TrainingProgress(**{name: content[name] for name in TrainingProgress._fields}), state


def resume_or_clear(
    run: Run, files: list[str], fingerprint: RunFingerprint
) -> tuple[TrainingProgress, TrainState] | None:
    """Returns where the run goes on; None where it begins, in a folder from which its `files` have
    then been removed.

    Raises:
        InputError: if the run is to be resumed and cannot be.
    """
    if run.resume:
        if point := latest_point(run.out, fingerprint, tqdm.write):
            progress, _ = point
            history = run.out / HISTORY_FILE
            length = history.stat().st_size if history.exists() else 0
            require(length >= progress.history_bytes, f"{history} is shorter than it was")
            tqdm.write(f"going on at phase {progress.phase}, step {progress.step}")
            return point
        left = [name for name in files if (run.out / name).exists()]
        require(
            not left,
            f"{run.out} holds {', '.join(left)} but no {RESUME_FOLDER}: nothing to resume",
        )
    own = [HISTORY_FILE, PLOT_FILE, *files]
    for path in [*resume_points(run.out), *(run.out / name for name in own)]:
        path.unlink(missing_ok=True)
    return None


def remove_resume_points(out: Path) -> None:
    """Removes what only a resumption needs."""
    shutil.rmtree(out / RESUME_FOLDER, ignore_errors=True)
