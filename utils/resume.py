"""Where a run stands: kept beside its output while it lasts, so that it can go on exactly."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from config import InputError, ModelConfig, Run, require
from transfer import State
from utils.checkpoint import check_weights
from utils.device import on_cpu
from utils.errors import RunStopped
from utils.files import load_tensors, save_tensors
from utils.history import HISTORY, PLOT, History
from utils.meter import Reading

FOLDER = "resume"
SCHEMA = 1
KEPT = 2
FREE = (
    "data.", "device", "dry_run", "init_from", "out", "overwrite", "precision", "resume",
    "training.capture", "training.checkpoint_every", "training.fused",
    "tracker", "training.lean", "training.micro_batch_size",
)  # fmt: skip
"""Settings that may change between a run and its resumption (the tokens themselves and what
the run started from may not)."""
LIMITS = ("max_logit_drift", "max_loss_drift")
"""So may these, by the ends of their names: they train nothing, and who meets one may want more."""


class Place(NamedTuple):
    """A moment between two optimizer steps, before anything is logged or evaluated after the first
    of them: whoever goes on from here does what the run would have done."""

    phase: int
    """Its number."""
    step: int
    """Optimizer steps done in the phase."""
    reading: Reading
    """Of the meter."""
    history: int
    """Bytes of the history so far."""
    since: float
    """Seconds that the run had taken when the phase began."""

    @classmethod
    def first(cls, phase: int, history: History, since: float) -> "Place":
        return cls(phase, 0, Reading.nothing(), history.size(), since)

    @property
    def file(self) -> str:
        return f"phase{self.phase:03d}-step{self.step:08d}.pt"


@dataclass(frozen=True)
class Identity:
    """What a run must have in common with the one that it continues."""

    settings: dict[str, object]
    fingerprint: str
    device: str
    threads: int

    def differences(self, other: "Identity") -> list[str]:
        names = sorted(self.settings.keys() | other.settings.keys())
        pairs = [(name, self.settings.get(name), other.settings.get(name)) for name in names]
        pairs.append(("corpus (fingerprint)", self.fingerprint, other.fingerprint))
        return [f"{name} was {was}, is {now}" for name, was, now in pairs if was != now]


def identity(run: Run, fingerprint: str, device: torch.device, origin: str = "") -> Identity:
    """`fingerprint` is that of the tokens, `origin` that of the model that the run starts from."""
    settings = {
        name: value
        for name, value in flat(asdict(run)).items()
        if not name.startswith(FREE) and not name.endswith(LIMITS)
    }
    if origin:
        settings["init_from (fingerprint)"] = origin
    return Identity(settings, fingerprint, device.type, torch.get_num_threads())


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    found: dict[str, object] = {}
    for name, value in values.items():
        nested = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        found |= {f"{prefix}{name}": value} if nested is None else nested
    return found


class Keeper:
    """Keeps where the run stands every so often, at the end of each phase, and when it is told to.

    No generator runs through the training (batches, growth and samples each draw from one of their
    own, seeded by the run's seed and an index), so there is none to be kept.
    """

    def __init__(self, run: Run, who: Identity, history: History, place: Place | None):
        """`place` is kept already."""
        self.out, self.who, self.history = run.out, who, history
        every = run.training.checkpoint_every
        self.steps = None if every.endswith("min") else int(every)
        self.seconds = 60.0 * int(every.removesuffix("min"))
        self.kept, self.kept_at = place.file if place else "", time.perf_counter()

    def due(self, step: int, last: int) -> bool:
        if self.steps is None:
            return step == last or time.perf_counter() - self.kept_at > self.seconds
        return step == last or step % self.steps == 0 < step

    def keep(self, place: Place, state: State) -> None:
        """Then sweeps all but the last KEPT. Raises OSError where it cannot be written, RunStopped
        where a weight is no longer finite."""
        if place.file == self.kept:
            return
        finite = torch.stack([weight.isfinite().all() for weight in state.weights.values()])
        if not finite.all():
            name = list(state.weights)[int(finite.int().argmin())]
            raise RunStopped(f"phase {place.phase}, step {place.step}: {name} is not finite")
        self.history.sync()
        content = {
            "schema": SCHEMA,
            **asdict(self.who),
            **place._asdict(),
            "reading": {**place.reading._asdict(), "sums": place.reading.sums.cpu()},
            "model": asdict(state.config),
            "weights": on_cpu(state.weights),
            "adam": {name: on_cpu(moments) for name, moments in state.adam.items()},
        }
        save_tensors(self.out / FOLDER / place.file, content, zip_sums=False)
        self.kept, self.kept_at = place.file, time.perf_counter()
        for old in points(self.out)[:-KEPT]:
            old.unlink()


def points(out: Path) -> list[Path]:
    """Oldest first."""
    return sorted((out / FOLDER).glob("phase*-step*.pt"))


def latest(out: Path, who: Identity, say: Callable[[str], None]) -> tuple[Place, State] | None:
    """The last point that is whole; None where none was ever kept.

    Raises InputError where all are damaged, and where the run is not the one that they are of.
    """
    files = points(out)
    for path in reversed(files):
        try:
            content = load_tensors(path)
            require(content.get("schema") == SCHEMA, f"{path} is of another schema")
            was = Identity(**{name: content[name] for name in asdict(who)})
            point = unpack(path, content)
        except (InputError, KeyError, TypeError, AttributeError) as error:
            say(f"{path} cannot be used ({error}); trying the one before")
            continue
        if differences := was.differences(who):
            raise InputError(f"{out} holds another run: {'; '.join(differences)}")
        if (was.device, was.threads) != (who.device, who.threads):
            say(
                f"kept on {was.device} with {was.threads} threads, going on on {who.device} with "
                f"{who.threads}: not bit for bit"
            )
        return point
    require(not files, f"none of the points in {out / FOLDER} is whole: there is nothing to resume")
    return None


def resumed(run: Run, files: list[str], who: Identity) -> tuple[Place, State] | None:
    """Where to go on; None where the run begins, in a folder that is then free of the `files`."""
    if run.resume:
        if point := latest(run.out, who, tqdm.write):
            place, _ = point
            length = (run.out / HISTORY).stat().st_size if (run.out / HISTORY).exists() else 0
            require(length >= place.history, f"{run.out / HISTORY} is shorter than it was")
            tqdm.write(f"going on at phase {place.phase}, step {place.step}")
            return point
        left = [name for name in files if (run.out / name).exists()]
        require(not left, f"{run.out} holds {', '.join(left)} but no {FOLDER}: nothing to resume")
    for path in [*points(run.out), *(run.out / name for name in (HISTORY, PLOT, *files))]:
        path.unlink(missing_ok=True)
    return None


def unpack(path: Path, content: dict) -> tuple[Place, State]:
    state = State(ModelConfig.of(content["model"]), content["weights"], content["adam"])
    check_weights(path, state.config, state.weights)
    content["reading"] = Reading(**content["reading"])
    return Place(**{name: content[name] for name in Place._fields}), state


def forget(out: Path) -> None:
    """Removes what only a resumption needs."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
