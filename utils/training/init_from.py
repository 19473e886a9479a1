"""What a run starts from: random weights, or a model that brings its own tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from config import Growth, InputError, ModelConfig, Run, Upcycle, require
from models import SLM
from transfer import TrainState
from utils.checkpoint.model import load_checkpoint
from utils.hf.pretrained import find_pretrained, model_title
from utils.runtime.hub import hash_file
from utils.text.tokenizer import is_checkpoint


@dataclass(frozen=True)
class InitSource:
    """Where a run's first weights come from. For a model in transformers' format nothing large is
    read before its `fingerprint` or `initial_state` is."""

    run: Run
    """The run, with the model that there is to train and its tokenizer."""
    title: str = ""
    """What the model began as; empty for random weights."""
    max_seq_len: int = 0
    """Its longest context in tokens; 0 for a new model."""
    growth_history: tuple[Growth, ...] = ()
    """Every operator that it has been through, in order."""
    tokens: int = 0
    """Training tokens that it has seen in this project."""
    read_weights: Callable[[], dict[str, Tensor]] | None = None
    """Reads its weights; None for random ones."""
    read_fingerprint: Callable[[], str] = str
    """Reads all of it, and returns what tells it from others."""

    @classmethod
    def from_run(cls, run: Run) -> "InitSource":
        """Finds the model that `run.init_from` names, if it names one.

        Raises:
            InputError: if it names no model that can be trained here, or one that a phase of the
                schedule cannot grow.
        """
        if not run.init_from:
            return cls(run)
        find = find_own_checkpoint if is_checkpoint(run.init_from) else find_hf_model
        try:
            config, source = find(run)
        except InputError as error:
            raise InputError(f"init_from = {error}") from None
        check_context(run, config, source.max_seq_len)
        check_upcycling(run, config)
        model = replace(config, seq_len=run.model.seq_len)
        data = replace(run.data, tokenizer=run.init_from)
        return replace(source, run=replace(run, model=model, data=data))

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the model, all of which is read for it; empty where there is none."""
        return self.read_fingerprint()

    def initial_state(self, config: ModelConfig) -> TrainState:
        """Returns the model before its first step, in float32. `config` is the run's, with the
        vocabulary known."""
        if self.read_weights is None:
            torch.manual_seed(self.run.seed)
            return TrainState.from_model(SLM(config))
        weights = self.read_weights()
        return TrainState(config, {name: weight.float() for name, weight in weights.items()})


def find_hf_model(run: Run) -> tuple[ModelConfig, InitSource]:
    """Returns the configuration and the source of a model in transformers' format."""
    found = find_pretrained(run.init_from)
    source = InitSource(
        run,
        title=model_title(run.init_from),
        max_seq_len=found.config.seq_len,
        read_weights=lambda: found.load_state(torch.float32).weights,
        read_fingerprint=found.fingerprint,
    )
    return found.config, source


def find_own_checkpoint(run: Run) -> tuple[ModelConfig, InitSource]:
    """Returns the configuration and the source of a checkpoint of this project, which is read once
    to see that it is whole."""
    path = Path(run.init_from).expanduser()
    saved = load_checkpoint(path)
    require(
        path.resolve().parent != run.out.resolve(),
        f"{path} lies in out = {run.out}, which this run writes: --out FOLDER goes elsewhere",
    )
    source = InitSource(
        run,
        title=saved.init_from,
        max_seq_len=max(saved.config.seq_len, saved.max_seq_len),
        growth_history=saved.growth_history,
        tokens=saved.tokens,
        read_weights=lambda: load_checkpoint(path).weights,
        read_fingerprint=lambda: hash_file(path)[:16],
    )
    return saved.config, source


def check_context(run: Run, config: ModelConfig, longest: int) -> None:
    """Raises InputError unless a model can be trained on contexts of the run's length: at most
    `longest`, and its own where its positions are learned."""
    is_learned = config.position_embedding == "learned"
    context = config.seq_len if is_learned else longest
    fits = run.model.seq_len == context if is_learned else run.model.seq_len <= context
    require(
        fits,
        f"model.seq_len = {run.model.seq_len}: the context of {run.init_from} is {context} tokens; "
        f"--model.seq-len {context} trains on it",
    )


def check_upcycling(run: Run, config: ModelConfig) -> None:
    """Raises InputError, naming the phases, where some would upcycle a model that has experts."""
    schedule = enumerate(run.schedule.items(), 1)
    upcycling = [f"{i} ({name})" for i, (name, p) in schedule if isinstance(p.growth, Upcycle)]
    require(
        not (config.num_experts and upcycling),
        f"init_from = {run.init_from} has {config.num_experts} experts per layer already, so that "
        f"phase {', '.join(upcycling)} cannot upcycle it: the schedules `train.py grow_moe ...` "
        "and `train.py single ...` have no such phase",
    )
