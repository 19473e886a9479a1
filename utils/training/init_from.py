"""What a run starts from: random weights, or a pretrained model that brings its own tokenizer."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from config import InputError, ModelConfig, Run, require
from models import SLM
from transfer import TrainState
from utils.hf.pretrained import Pretrained, find_pretrained


@dataclass(frozen=True)
class InitSource:
    """Where a run's first weights come from. Nothing large is read before its
    `fingerprint` or `initial_state` is."""

    run: Run
    """The run, with the model that there is to train and its tokenizer."""
    pretrained: Pretrained | None = None

    @classmethod
    def from_run(cls, run: Run) -> "InitSource":
        """Finds the model that `run.init_from` names, if it names one.

        Raises:
            InputError: if it names no model that can be trained here.
        """
        if not run.init_from:
            return cls(run)
        try:
            pretrained = find_pretrained(run.init_from)
        except InputError as error:
            raise InputError(f"init_from = {error}") from None
        longest = pretrained.config.seq_len
        require(
            run.model.seq_len <= longest,
            f"model.seq_len = {run.model.seq_len}: the context of {run.init_from} is {longest} "
            "tokens",
        )
        model = replace(pretrained.config, seq_len=run.model.seq_len)
        data = replace(run.data, tokenizer=run.init_from)
        run = replace(run, model=model, data=data)
        return cls(run, pretrained)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the pretrained model, all of which is read for it; empty where there is
        none."""
        return self.pretrained.fingerprint() if self.pretrained else ""

    def initial_state(self, config: ModelConfig) -> TrainState:
        """Returns the model before its first step, in float32. `config` is the run's, with the
        vocabulary known."""
        if self.pretrained is None:
            torch.manual_seed(self.run.seed)
            return TrainState.from_model(SLM(config))
        return TrainState(config, self.pretrained.load_state(torch.float32).weights)
