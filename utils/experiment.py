"""Choices at a growth, compared:  python -m utils.experiment noise tiny --seeds 2.

Every arm starts from one checkpoint, weights and Adam's moments, of the phase before, and differs
from the others in one setting. Seeds change the text that is read and what growth draws.
"""

import json
import os
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple, get_args

import torch
from tqdm import tqdm

from config import (
    PRESETS,
    SCHEDULE_FIELDS,
    AtGrowth,
    Phase,
    Run,
    Scaling,
    TrainingConfig,
    Where,
    full,
    require,
)
from models import SLM
from train import grown, run_phase, train
from transfer import State, plan_for
from utils.arms import report
from utils.cli import flags, run_command
from utils.cpu import keep_for_next_step
from utils.data import Corpus, check_length, prepare
from utils.device import choose_device, reset_peak_memory
from utils.history import HISTORY, History, header, read
from utils.lab import Lab, record_start
from utils.optimizer import home
from utils.output import claimed, is_finished, within_memory
from utils.resume import Keeper, Place, flat, identity, latest
from utils.schedule import check_memory, choose_step, stages

IDLE = ("data.", "dry_run", "out", "overwrite", "resume", "tracker", "training.checkpoint_every")
"""Settings that an arm comes out the same with; of data, the tokens themselves are compared."""


class Arms(NamedTuple):
    """Values of fields, by the name of the arm."""

    phase: str
    """That grows and is trained, by its name in the schedule."""
    growth: dict[str, dict[str, object]]
    """Of its operator."""
    training: dict[str, dict[str, object]]
    """Of the training config."""

    @property
    def names(self) -> list[str]:
        return [*self.growth, *self.training]


EXPERIMENTS = {
    # 0.01 of a weight's standard deviation, 40 dB, is about 1e-4 on weights of 0.02 / 2.
    "noise": Arms(
        "wide",
        {f"noise-{size:g}": {"noise": size} for size in (0.0, 0.01, 0.0316, 0.1, 0.316)},
        {},
    ),
    "upcycle": Arms(
        "moe",
        {
            "copies": {},
            # Of a standard deviation of 0.02, which others take, at a width of 512.
            "router-0.3": {"router_scale": 0.3},
            "router-3": {"router_scale": 3.0},
            "redrawn-0.5": {"redrawn": 0.5},
        },
        {},
    ),
    "depth": Arms(
        "deep",
        {
            f"{init}-{where}": {"init": init, "where": where}
            for init in ("identity", "copy")
            for where in get_args(Where)
        },
        {},
    ),
    "optimizer": Arms("wide", {}, {how: {"at_growth": how} for how in get_args(AtGrowth)}),
    "lr": Arms("wide", {}, {how: {"lr_scaling": how} for how in get_args(Scaling)}),
}


@dataclass(frozen=True)
class Experiment:
    """python -m utils.experiment NAME [PRESET] [--field value ...]

    NAME: noise, upcycle, depth, optimizer, lr. Arms that are finished already are not run again,
    nor those that come to the same growth as an earlier one (one new block has but so many places).
    """

    name: str = "noise"
    """Which settings are compared."""
    phase: str = ""
    """The phase that grows and is trained; empty: the experiment's own."""
    arms: tuple[str, ...] = ()
    """Only these, by name; none: all."""
    seeds: int = 2
    """Of each arm. Arms are compared at the same seed, which is the same text in the same order."""
    run: Run = field(default_factory=full)
    """What all arms have in common; `run.out` holds a folder for each arm, and what they share."""

    def __post_init__(self) -> None:
        names = ", ".join(EXPERIMENTS)
        require(self.name in EXPERIMENTS, f"there is no experiment {self.name}, only {names}")
        require(self.seeds >= 1, f"seeds = {self.seeds} must be at least 1")
        for arm in self.arms:
            known = EXPERIMENTS[self.name].names
            require(arm in known, f"arms = {arm} is not in {self.name}, only {', '.join(known)}")
        schedule = self.run.schedule
        require(
            self.grows in schedule,
            f"phase = {self.grows} is not in the schedule ({', '.join(schedule)})",
        )
        how = schedule[self.grows].grow
        require(how is not None, f"phase = {self.grows} does not grow")
        fields = asdict(how).keys() if how is not None else ()
        for changes in EXPERIMENTS[self.name].growth.values():
            require(
                changes.keys() <= set(fields),
                f"phase = {self.grows} grows by {type(how).__name__}, which has no "
                f"{', '.join(changes)}",
            )

    @property
    def grows(self) -> str:
        return self.phase or EXPERIMENTS[self.name].phase

    def trunk(self) -> Run:
        """The phases before, and of the one that grows what they decay to, its learning rate."""
        names = list(self.run.schedule)
        before = names[: names.index(self.grows)]
        require(bool(before), f"phase = {self.grows} has none before it to start from")
        phases = {name: self.run.schedule[name] for name in before}
        phases[self.grows] = Phase(steps=1, lr=self.run.schedule[self.grows].lr)
        return replace(self.common(phases), out=self.run.out / f"before-{self.grows}")

    def common(self, phases: dict, **training: object) -> Run:
        """With a schedule of its own, beside which the fields of the default one are idle."""
        default = TrainingConfig()
        idle = {name: getattr(default, name) for name in SCHEDULE_FIELDS}
        changed = replace(self.run.training, **idle, **training)
        return replace(self.run, phases=phases, training=changed)

    def runs(self) -> dict[str, list[Run]]:
        """By arm, a Run for each seed; its last phase is the one to be trained."""
        how = EXPERIMENTS[self.name]
        phase, before = self.run.schedule[self.grows], self.trunk().phases
        start = stages(self.trunk())[-2].config
        found, seen = {}, []
        for name in self.arms or how.names:
            assert phase.grow is not None, "checked above"
            grow = replace(phase.grow, **how.growth.get(name, {}))
            last = replace(phase, grow=grow, init_checkpoint="")
            run = self.common({**before, self.grows: last}, **how.training.get(name, {}))
            does = plan_for(start, grow), run.training
            if does in seen:
                continue
            seen.append(does)
            # One arm of each experiment is the run as it stands: it is trained for all of them.
            same = run == self.common({**before, self.grows: replace(phase, init_checkpoint="")})
            folder = f"{self.grows}-{'as-it-is' if same else name}"
            found[name] = [
                replace(run, seed=run.seed + i, out=run.out / f"{folder}-seed{i}")
                for i in range(self.seeds)
            ]
        return found


class Idle(Keeper):
    """Keeps nothing: an arm that was stopped is run again."""

    def due(self, step: int, last: int) -> bool:
        return False

    def keep(self, place: Place, state: State) -> None:
        pass


def shared(run: Run, corpus: Corpus, device: torch.device) -> State:
    """What every arm starts from, on the CPU: the State after all phases of `run` but the last. It
    is trained once."""
    found, who = stages(run)[:-1], identity(run, corpus.fingerprint, device)
    with claimed(run.out):
        point = latest(run.out, who, tqdm.write)
        if point is None or (point[0].phase, point[0].step) != (len(found), found[-1].phase.steps):
            (run.out / HISTORY).unlink(missing_ok=True)
            with History(run.out / HISTORY) as history:
                lab = Lab.of(run, found, corpus, device, history, Keeper(run, who, history, None))
                record_start(lab)
                state = first_state(run, device)
                for stage in found:
                    state = run_phase(state, stage, lab, None)
            point = latest(run.out, who, tqdm.write)
        assert point is not None, "the end of a phase is always kept"
        return point[1]


def train_arm(run: Run, state: State, corpus: Corpus, device: torch.device) -> list[dict]:
    """The history of the last phase of `run`, grown out of `state`, which is left as it was."""
    path = run.out / HISTORY
    if is_trained(run, corpus):
        return read(path)
    found = stages(run)
    stage = found[-1]
    assert stage.phase.grow is not None, "the experiment has checked it"
    with claimed(run.out), within_memory(stage, run.training.micro_batch_size):
        path.unlink(missing_ok=True)
        with History(path) as history:
            who = identity(run, corpus.fingerprint, device)
            lab = Lab.of(run, found, corpus, device, history, Idle(run, who, history, None))
            record_start(lab)
            reset_peak_memory(device)
            state = home(deepcopy(state), run.training, device)
            state = grown(state, stage.phase.grow, stage, lab)
            train(state, stage, lab, Place.first(stage.number, history, history.now()))
            history("end", tokens=stage.tokens_at(stage.phase.steps))
    return read(path)


def is_trained(run: Run, corpus: Corpus) -> bool:
    """Whether the arm is there already, on the same text and with the same settings."""
    if not ((run.out / HISTORY).exists() and is_finished(run.out)):
        return False
    told = header(read(run.out / HISTORY))
    wanted = json.loads(json.dumps(asdict(run), default=os.fspath))
    was, now = (
        {name: value for name, value in flat(config).items() if not name.startswith(IDLE)}
        for config in (told.get("config", {}), wanted)
    )
    return was == now and told["fingerprint"] == corpus.fingerprint


def first_state(run: Run, device: torch.device) -> State:
    torch.manual_seed(run.seed)
    return home(State.of(SLM(run.model)), run.training, device)


def main(options: Experiment) -> None:
    run = options.run
    device = choose_device(run.device)
    keep_for_next_step()
    choose_step(run, stages(run), device)
    corpus = prepare(run.data, run.model.vocab_size, tqdm.write)
    check_length(corpus, run.model.seq_len)
    model = replace(run.model, vocab_size=run.model.vocab_size or corpus.vocab_size)
    options = replace(options, run=replace(run, model=model))
    arms = options.runs()
    check_memory(stages(next(iter(arms.values()))[0]), run, device)
    for name in options.arms or EXPERIMENTS[options.name].names:
        if name not in arms:
            tqdm.write(f"{name} is left out: it comes to the same growth as an arm before it")
    state = shared(options.trunk(), corpus, device)
    histories = {}
    for arm, runs in arms.items():
        for each in runs:
            tqdm.write(f"\n{arm}, seed {each.seed}")
            histories.setdefault(arm, []).append(train_arm(each, state, corpus, device))
    print(f"\n{report(histories)}")


def parse(args: list[str]) -> Experiment:
    """`[NAME [PRESET]] [--field value ...]` -> Experiment. Raises InputError if it can't be."""
    words: list[str] = []
    while args and not args[0].startswith("-") and len(words) < 2:
        words.append(args[0])
        args = args[1:]
    name, preset = [*words, *("noise", "full")[len(words) :]]
    require(preset in PRESETS, f"there is no preset {preset}, only {', '.join(PRESETS)}")
    return flags(
        Experiment,
        args,
        default=Experiment(name, run=PRESETS[preset]()),
        prog=f"python -m utils.experiment {name} {preset}",
        description=Experiment.__doc__ or "",
    )


if __name__ == "__main__":
    run_command(lambda: main(parse(sys.argv[1:])))
