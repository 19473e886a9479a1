"""Points to resume from: kept beside a run's output while it lasts, so that it can go on exactly,
or from there on with other settings."""

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config import InputError, ModelConfig, Run, require
from transfer import TrainState
from utils.checkpoint.background import BackgroundWriter
from utils.checkpoint.model import Checkpoint, check_weights, load_checkpoint, save_checkpoint
from utils.metrics.history import (
    HISTORY_FILE,
    PLOT_FILE,
    History,
    read_history,
    run_record,
    select_events,
)
from utils.metrics.throughput import AccumulatorState
from utils.runtime.atomic_io import (
    ends_with_checksum,
    fsync_folder,
    load_tensors,
    save_tensors,
)
from utils.runtime.device import total_bytes
from utils.runtime.errors import NotFinite
from utils.runtime.signals import defer_signals
from utils.runtime.stopwatch import TIME_KINDS
from utils.schedule.phases import ResolvedPhase, resume_phases, setting_phases

RESUME_FOLDER = "resume"
RESUME_SCHEMA = 5
KEPT_POINTS = 2
CHANGEABLE = (
    "data.", "device", "dry_run", "init_from", "out", "overwrite", "precision", "resume",
    "tracker", "training.checkpoint_every", "training.cuda_graph", "training.fused_kernels",
    "training.low_memory", "training.micro_batch_size",
)  # fmt: skip
"""Settings that may change between a run and its resumption, by the start of their names. (The
tokens themselves and what the run started from may not.)"""
ADJUSTABLE = re.compile(
    r"training\.(batch_size|beta|decay_to|eps|eval_|final_eval_tokens|grad_clip"
    r"|load_balance_coef|log_every|lr_|min_lr_ratio|sample_tokens|steps_|warmup_fraction"
    r"|weight_decay|z_loss_coef).*"
    r"|phases\..+\.(batch_size|lr|steps)"
)
"""Settings that may change too, but not what has been trained with them: the new ones hold from the
resume point on, and the history says so."""
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
    first_token: int
    """Training tokens of the run before the phase."""
    tokens: int
    """Training tokens of the whole run so far."""
    lr: float = 0.0
    """Learning rate of the last step."""

    @classmethod
    def start_of(
        cls,
        phase: int,
        history_bytes: int = 0,
        phase_started_s: float = 0.0,
        first_token: int = 0,
    ) -> "TrainingProgress":
        """Returns the point before the first step of a phase."""
        empty = AccumulatorState.empty()
        return cls(phase, 0, empty, history_bytes, phase_started_s, first_token, first_token)

    def is_inside(self, phase: ResolvedPhase) -> bool:
        """Whether `phase` had begun: its growth is done."""
        return self.phase == phase.number

    @property
    def file_name(self) -> str:
        """Name of the resume point's file; names sort by time."""
        return f"phase{self.phase:03d}-step{self.step:08d}.pt"

    def resume(self, phases: list[ResolvedPhase]) -> list[ResolvedPhase]:
        """Returns the phases of a run that goes on from here."""
        return resume_phases(phases, self.phase, self.step, self.first_token, self.tokens)


class SettingChange(NamedTuple):
    """A setting that one of two runs has otherwise than the other."""

    name: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.name} was {self.old}, is {self.new}"


@dataclass(frozen=True)
class RunFingerprint:
    """What tells a run from others, and where it computes."""

    settings: dict[str, object]
    """Settings by their dotted names, and the fingerprints of what the run is trained on."""
    device: str
    threads: int

    def changes(self, other: "RunFingerprint") -> list[SettingChange]:
        """Returns each setting that `other` has otherwise."""
        return setting_changes(self.settings, other.settings)


class ResumePoint(NamedTuple):
    """A point that a run can go on from."""

    progress: TrainingProgress
    state: TrainState
    changes: list[SettingChange]
    """Settings that hold from here on in place of those before."""
    seconds: dict[str, float]
    """Seconds that the run had taken, by TIME_KINDS."""


def run_fingerprint(
    run: Run, corpus: str, device: torch.device, init_source: str = ""
) -> RunFingerprint:
    """Returns a run's fingerprint, given those of its tokens and of the model it starts from (empty
    for random weights)."""
    settings = lasting_settings(asdict(run), corpus, init_source)
    return RunFingerprint(settings, device.type, torch.get_num_threads())


def lasting_settings(config: dict, corpus: str, init_source: str) -> dict[str, object]:
    """Returns the settings by which a run is known, given all of them as nested dictionaries and
    the fingerprints of its tokens and of the model it starts from."""
    settings = {
        name: value
        for name, value in flatten_settings(config).items()
        if not name.startswith(CHANGEABLE) and TOLERANCE not in name
    }
    order = {"phases": list(config["phases"])} if config["phases"] else {}
    sources = {"corpus (fingerprint)": corpus, "init_from (fingerprint)": init_source}
    return settings | order | {name: value for name, value in sources.items() if value}


def recorded_settings(events: list[dict]) -> dict[str, object]:
    """Returns the settings of a run, as the last changes have left them, from its history.

    Raises:
        InputError: if the history does not begin with them.
    """
    record = run_record(events)
    require(
        {"config", "tokenizer"} <= record.keys(),
        f"{HISTORY_FILE} does not begin with the settings of a run, as this version writes them",
    )
    fingerprints = record["fingerprint"], record["init_fingerprint"] or ""
    changes = {event["setting"]: event["new"] for event in select_events(events, "change")}
    return lasting_settings(record["config"], *fingerprints) | changes


def setting_changes(old: dict[str, object], new: dict[str, object]) -> list[SettingChange]:
    """Returns each setting that is another one in `new`."""
    names = sorted(old.keys() | new.keys())
    changes = [SettingChange(name, old.get(name), new.get(name)) for name in names]
    return [change for change in changes if change.old != change.new]


def adopt_settings(default: Run, out: Path) -> Run:
    """Returns `default` with those of its settings that a resumption may change as the run in `out`
    was left with them."""
    path = out / HISTORY_FILE
    events = read_history(path) if path.exists() else []
    settings = recorded_settings(events) if events else {}
    if settings.get("phases", []) != list(default.phases):
        return default  # another run: what differs is named when it is to go on
    for name, value in settings.items():
        if ADJUSTABLE.fullmatch(name):
            default = set_field(default, name, value)
    return default


def set_field(config: Any, name: str, value: object) -> Any:
    """Returns a dataclass, or a dictionary of dataclasses, with the field of a dotted name set."""
    if isinstance(config, dict):
        key, _, name = name.rpartition(".")  # the name of a phase may have dots
        return config | {key: set_field(config[key], name, value)}
    name, _, rest = name.partition(".")
    value = set_field(getattr(config, name), rest, value) if rest else value
    return replace(config, **{name: value})


def check_changes(
    out: Path,
    changes: list[SettingChange],
    progress: TrainingProgress,
    phases: Sequence[ResolvedPhase],
) -> None:
    """Raises InputError, which names what differs, where changed settings would make another run of
    what is done, or would have no effect on what is left. No setting may change without phases."""
    fixed = [change for change in changes if not (phases and ADJUSTABLE.fullmatch(change.name))]
    require(not fixed, f"{out} holds another run: {'; '.join(map(str, fixed))}")
    if not changes:
        return
    current = phases[progress.phase - 1]
    require(
        current.steps >= progress.step,
        f"{out}: {current} has taken {progress.step} steps already, it cannot end after "
        f"{current.steps}",
    )
    for change in changes:
        last = setting_phases(change.name, phases)[-1]
        is_length = re.fullmatch(r"training\.steps_.*|phases\..+\.steps", change.name)
        # The point at the end of the last phase is without Adam's state.
        has_ended = is_length and current is phases[-1] and change.old == progress.step
        can_go_on = not has_ended and (progress.step < current.steps or is_length)
        is_done = last.number < progress.phase or (last is current and not can_go_on)
        further = (
            "; --resume without that change finishes the run, after which this command says how to "
            f"train its model further, with --init-from {out / last.checkpoint}"
        )
        remedy = further if last is phases[-1] else ""
        require(not is_done, f"{out}: {change}, but {last} has been trained{remedy}")


def flatten_settings(values: dict, prefix: str = "") -> dict[str, object]:
    """Flattens nested settings: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        nested = flatten_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{name}": value} if nested is None else nested
    return flat


class PhaseEnd(NamedTuple):
    """What is written at the end of a phase beside the point to resume from."""

    file: str
    """Name of the checkpoint's file."""
    checkpoint: Checkpoint
    """The checkpoint; its weights are those of the point."""
    is_last: bool
    """Whether no phase follows, so that Adam's state is of no use."""


class ResumeCheckpointer:
    """Keeps a point to resume from every so often, at the end of each phase, and when told to. The
    point at the end of a phase shares its weights with the phase's checkpoint; after the last phase
    there is nothing more to train, and it holds no Adam state.

    No random generator runs through the training (batches, growth and samples each draw from one of
    their own, seeded by the run's seed and an index), so there is none to be kept.
    """

    def __init__(
        self,
        run: Run,
        fingerprint: RunFingerprint,
        history: History,
        writer: BackgroundWriter,
        kept: TrainingProgress | None = None,
    ):
        """`kept` is the progress of which there is a resume point already."""
        self.out, self.fingerprint, self.history = run.out, fingerprint, history
        self.writer = writer
        every = run.training.checkpoint_every
        self.every_steps = None if every.endswith("min") else int(every)
        self.every_s = 60.0 * int(every.removesuffix("min"))
        self.last_file = kept.file_name if kept else ""
        self.has_saved_end = kept is not None
        """Whether the last point, if it is at the end of a phase, came with its checkpoint."""
        self.last_time = time.perf_counter()

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether a point is to be kept after `step` of a phase that ends with `last_step`."""
        if self.every_steps is None:
            is_time = time.perf_counter() - self.last_time > self.every_s
            return step == last_step or is_time
        return step == last_step or step % self.every_steps == 0 < step

    def has(self, progress: TrainingProgress, is_end: bool = False) -> bool:
        """Whether the last point that was kept, or resumed from, is this one; at the end of a
        phase, with its checkpoint."""
        return progress.file_name == self.last_file and (self.has_saved_end or not is_end)

    def keep(
        self,
        progress: TrainingProgress,
        state: TrainState,
        end: PhaseEnd | None = None,
        advice: str = "",
    ) -> None:
        """Begins to write a point, after which all but the last KEPT_POINTS are removed. At the end
        of a phase its checkpoint is written first, and holds the point's weights. `advice` is for
        NotFinite, which the write may raise when the next phase has begun.

        Raises:
            OSError: if the write before it has failed, or this one where it is made in place.
            NotFinite: if a weight is no longer finite.
        """
        if self.has(progress, end is not None):
            return
        self.history.sync()
        if end and end.is_last:
            state = TrainState(state.config, state.weights)
        state = self.writer.copy(state)
        metrics = progress.metrics._asdict() | {"sums": progress.metrics.sums.to("cpu", copy=True)}
        content = {
            "schema": RESUME_SCHEMA,
            **asdict(self.fingerprint),
            **progress._asdict(),
            "metrics": metrics,
            "seconds": self.writer.stopwatch.seconds(),
            "config": asdict(state.config),
            "weights": None if end else state.weights,
            "checkpoint": None,
            "adam": state.adam,
        }

        path = self.out / RESUME_FOLDER / progress.file_name
        files = {self.out / end.file if end else path: total_bytes(state.weights)}
        files[path] = files.get(path, 0) + sum(map(total_bytes, state.adam.values()))

        def write() -> None:
            check_finite_weights(progress, state.weights, advice)
            if end:
                checkpoint = replace(end.checkpoint, weights=state.weights)
                checksum = save_checkpoint(self.out / end.file, checkpoint)
                content["checkpoint"] = {"file": end.file, "checksum": checksum}
            save_tensors(path, content, zip_sums=False)
            for old in resume_points(self.out)[: -1 if end and end.is_last else -KEPT_POINTS]:
                old.unlink()

        with defer_signals():  # a signal finds the point kept, or not begun
            self.writer.submit(write, files)
            self.last_file, self.last_time = progress.file_name, time.perf_counter()
            self.has_saved_end = end is not None


def check_finite_weights(
    progress: TrainingProgress, weights: Mapping[str, Tensor], advice: str
) -> None:
    """Raises NotFinite, naming the parameter, if a weight is no longer finite."""
    where = f"phase {progress.phase}, step {progress.step}"
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise NotFinite(f"{where}: {name} is not finite", advice)


def resume_points(out: Path) -> list[Path]:
    """Returns the files of a run's resume points, oldest first."""
    return sorted((out / RESUME_FOLDER).glob("phase*-step*.pt"))


def latest_point(
    out: Path,
    fingerprint: RunFingerprint,
    warn: Callable[[str], None],
    phases: Sequence[ResolvedPhase] = (),
) -> ResumePoint | None:
    """Returns the last point that is whole; None where none was ever kept.

    Args:
        out: The run's folder.
        fingerprint: What the run is known by.
        warn: Takes lines about points that cannot be used.
        phases: Phases of the run, whose settings may change at the point; none may without them.

    Raises:
        InputError: if all points are damaged, or if they are of another run.
    """
    files = resume_points(out)
    for path in reversed(files):
        try:
            content = load_tensors(path)
            require(content.get("schema") == RESUME_SCHEMA, f"{path} is of another schema")
            kept = RunFingerprint(**{name: content[name] for name in asdict(fingerprint)})
            progress, state, seconds = unpack_point(path, content)
        except (InputError, KeyError, TypeError, AttributeError) as error:
            warn(f"{path} cannot be used ({error}); trying the one before")
            continue
        changes = kept.changes(fingerprint)
        check_changes(out, changes, progress, phases)
        if (kept.device, kept.threads) != (fingerprint.device, fingerprint.threads):
            warn(
                f"kept on {kept.device} with {kept.threads} threads, going on on "
                f"{fingerprint.device} with {fingerprint.threads}: not bit for bit"
            )
        return ResumePoint(progress, state, changes, seconds)
    where = out / RESUME_FOLDER
    require(not files, f"none of the points in {where} is whole: there is nothing to resume")
    return None


def unpack_point(
    path: Path, content: dict
) -> tuple[TrainingProgress, TrainState, dict[str, float]]:
    """Returns what a resume point holds: the progress, the state and the seconds that they took.
    Raises InputError, KeyError or TypeError where it is not what a run would have written."""
    config = ModelConfig.from_dict(content["config"])
    if content["checkpoint"]:
        file = path.parents[1] / content["checkpoint"]["file"]
        require(
            ends_with_checksum(file, content["checkpoint"]["checksum"]),
            f"{file} is missing, or is not the one that was written with it",
        )
        checkpoint = load_checkpoint(file)  # and checks its weights
        require(checkpoint.config == config, f"{file} holds another model")
        weights = checkpoint.weights
    else:
        weights = content["weights"]
        check_weights(path, config, weights)
    content["metrics"] = AccumulatorState(**content["metrics"])
    progress = TrainingProgress(**{name: content[name] for name in TrainingProgress._fields})
    seconds = {kind: float(content["seconds"][kind]) for kind in TIME_KINDS}
    return progress, TrainState(config, weights, content["adam"]), seconds


def resume_or_clear(
    run: Run, phases: list[ResolvedPhase], fingerprint: RunFingerprint
) -> ResumePoint | None:
    """Returns where the run goes on; None where it begins, in a folder from which the files of its
    phases have then been removed.

    Raises:
        InputError: if the run is to be resumed and cannot be.
    """
    if run.resume:
        if point := latest_point(run.out, fingerprint, tqdm.write, phases):
            progress = point.progress
            history = run.out / HISTORY_FILE
            length = history.stat().st_size if history.exists() else 0
            require(length >= progress.history_bytes, f"{history} is shorter than it was")
            tqdm.write(f"going on at phase {progress.phase}, step {progress.step}")
            keep_until(run.out, progress)
            return point
        tqdm.write("no point to resume from was kept yet: the run begins anew")
    files = [name for phase in phases for name in phase.checkpoint_files]
    own = [HISTORY_FILE, PLOT_FILE, *files]
    for path in [*resume_points(run.out), *(run.out / name for name in own)]:
        path.unlink(missing_ok=True)
    return None


def keep_until(out: Path, progress: TrainingProgress) -> None:
    """Removes all points but that of `progress` and those before it that are kept. One after it
    could not be used, and what it tells of the history is no longer so; and a run that was killed
    may not have removed older ones."""
    fsync_folder(out / RESUME_FOLDER)  # its process may have been killed before it did
    points = resume_points(out)
    until = [path for path in points if path.name <= progress.file_name]
    for path in {*points} - {*until[-KEPT_POINTS:]}:
        path.unlink()


def remove_resume_points(out: Path) -> None:
    """Removes what only a resumption needs."""
    shutil.rmtree(out / RESUME_FOLDER, ignore_errors=True)
