"""The experiments, and the runs that each of them comes to.

The variants of an experiment start from one checkpoint of the phase before, weights and Adam's
moments, and differ in one setting. Seeds change the text that is read and what growth draws.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

from config import (
    SCHEDULE_FIELDS,
    BlockInit,
    LrScaling,
    Phase,
    Placement,
    PositiveInt,
    Run,
    StateOnGrowth,
    TrainingConfig,
    check_fields,
    full,
    require,
)
from utils.runtime.cli import find_preset, parse_flags


class Variants(NamedTuple):
    """The variants of an experiment: by name, the fields that are set and their values."""

    phase: str
    """Name, in the schedule, of the phase that grows and is trained."""
    growth: dict[str, dict[str, object]]
    """Variants that differ in a field of the phase's growth operator."""
    training: dict[str, dict[str, object]]
    """Variants that differ in a field of TrainingConfig."""

    @property
    def names(self) -> list[str]:
        """Names of all variants."""
        return [*self.growth, *self.training]


EXPERIMENTS = {
    # 0.01 of a weight's standard deviation, 40 dB, is about 1e-4 on weights of 0.02 / 2.
    "noise": Variants(
        "wide",
        {f"noise-{size:g}": {"noise": size} for size in (0.0, 0.01, 0.0316, 0.1, 0.316)},
        {},
    ),
    "upcycle": Variants(
        "moe",
        {
            "copies": {},
            # Factors on a standard deviation of 0.02, which others take, at a width of 512.
            "router-0.3": {"router_init_scale": 0.3},
            "router-3": {"router_init_scale": 3.0},
            "reinit-0.5": {"reinit_fraction": 0.5},
        },
        {},
    ),
    "depth": Variants(
        "deep",
        {
            f"{init}-{placement}": {"init": init, "placement": placement}
            for init in get_args(BlockInit)
            for placement in get_args(Placement)
        },
        {},
    ),
    "optimizer": Variants(
        "wide",
        {},
        {choice: {"optimizer_state_on_growth": choice} for choice in get_args(StateOnGrowth)},
    ),
    "lr": Variants("wide", {}, {choice: {"lr_scaling": choice} for choice in get_args(LrScaling)}),
}


@dataclass(frozen=True)
class Experiment:
    """python -m utils.experiment NAME [PRESET] [--field value ...]

    Compares choices at one growth. NAME is `noise` (how large the noise of widening is), `upcycle`
    (how experts and routers start), `depth` (where new blocks go, and whether they are identities
    or copies), `optimizer` (what happens to Adam's state) or `lr` (whether rates are scaled).

    Variants that are finished already are not run again, nor those that come to the same growth as
    an earlier one (a single new block has only so many places). A variant that was stopped starts
    again, so `run.resume`, `run.overwrite`, `run.dry_run` and `run.tracker` have no effect.

    The thinned histories of all variants are kept in `run.out`/NAME.jsonl, of which
    `python -m utils.experiment report FILE ...` prints the tables in Markdown.
    `python -m utils.experiment keep FOLDER FILE` keeps the history of any other run.
    """

    name: str = "noise"
    """Which settings are compared."""
    phase: str = ""
    """The phase that grows and is trained. Empty takes the experiment's own."""
    variants: tuple[str, ...] = ()
    """Run only these variants, by name. Empty runs all of them."""
    seeds: PositiveInt = 5
    """Seeds of each variant. A seed is the same text in the same order for every variant. With
    fewer than 5 the report claims no difference."""
    run: Run = field(default_factory=full)
    """What all variants have in common. `run.out` holds a folder for each of them, and one for what
    they share."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.name in EXPERIMENTS,
            f"there is no experiment {self.name}, only {', '.join(EXPERIMENTS)}",
        )
        known = EXPERIMENTS[self.name].names
        unknown = [name for name in self.variants if name not in known]
        require(
            not unknown,
            f"variants = {', '.join(unknown)} is not in {self.name}, only {', '.join(known)}",
        )
        schedule, name = self.run.schedule, self.growing_phase
        require(name in schedule, f"phase = {name} is not in the schedule ({', '.join(schedule)})")
        growth = schedule[name].growth
        require(growth is not None, f"phase = {name} does not grow")
        changes = EXPERIMENTS[self.name].growth.values()
        fields = dict.fromkeys(field for change in changes for field in change)
        missing = [field for field in fields if not hasattr(growth, field)]
        require(
            not missing,
            f"phase = {name} grows by {type(growth).__name__}, which has no {', '.join(missing)}",
        )
        require(name != next(iter(schedule)), f"phase = {name} has none before it to start from")

    @property
    def growing_phase(self) -> str:
        """Name of the phase that grows and is trained."""
        return self.phase or EXPERIMENTS[self.name].phase

    def variant_names(self) -> list[str]:
        """Returns the names of the variants that are asked for."""
        return list(self.variants or EXPERIMENTS[self.name].names)

    def make_run(self, last: Phase, **training: object) -> Run:
        """Returns the run of the phases before the growing one, and `last` in its place. The fields
        of the default schedule, which have no effect beside a schedule of one's own, are reset."""
        names = list(self.run.schedule)
        before = names[: names.index(self.growing_phase)]
        phases = {name: self.run.schedule[name] for name in before} | {self.growing_phase: last}
        unused = {name: getattr(TrainingConfig(), name) for name in SCHEDULE_FIELDS}
        changed = replace(self.run.training, **unused, **training)
        return replace(self.run, phases=phases, training=changed)

    def base_run(self) -> Run:
        """Returns the run as it stands, up to the growing phase."""
        return self.make_run(replace(self.run.schedule[self.growing_phase], init_checkpoint=""))

    def trunk_run(self) -> Run:
        """Returns the run that all variants share. Its last phase is not trained; it has the
        learning rate of the growing one, to which the phases before it decay."""
        last = Phase(steps=1, lr=self.run.schedule[self.growing_phase].lr)
        return replace(self.make_run(last), out=self.run.out / f"before-{self.growing_phase}")

    def variant_runs(self) -> dict[str, list[Run]]:
        """Returns by variant a run for each seed, of which the last phase is to be trained."""
        from transfer import make_plan  # torch takes a second: first the options
        from utils.schedule.phases import resolve_phases

        variants, base = EXPERIMENTS[self.name], self.base_run()
        phase, config = base.phases[self.growing_phase], resolve_phases(base)[-2].config
        assert phase.growth is not None, "checked above"
        runs, seen = {}, []
        for name in self.variant_names():
            growth = replace(phase.growth, **variants.growth.get(name, {}))
            run = self.make_run(replace(phase, growth=growth), **variants.training.get(name, {}))
            effect = make_plan(config, growth), run.training
            if effect in seen:
                continue
            seen.append(effect)
            # One variant of each experiment is the run as it stands: it is trained for all of them.
            folder = f"{self.growing_phase}-{'as-it-is' if run == base else name}"
            runs[name] = [
                replace(run, seed=run.seed + i, out=run.out / f"{folder}-seed{i}")
                for i in range(self.seeds)
            ]
        return runs


def parse_experiment(args: list[str]) -> Experiment:
    """Parses `[NAME [PRESET]] [--field value ...]`.

    Raises:
        InputError: for arguments that make no experiment.
    """
    words: list[str] = []
    while args and not args[0].startswith("-") and len(words) < 2:
        word, *args = args
        words.append(word)
    names = ", ".join(EXPERIMENTS)
    require(bool(words or args), f"name an experiment: {names}; --help says more")
    name, preset = [*words, *("noise", "full")[len(words) :]]
    return parse_flags(
        Experiment,
        args,
        default=Experiment(name, run=find_preset(preset)),
        prog=f"python -m utils.experiment {name} {preset}",
        description=Experiment.__doc__ or "",
    )
