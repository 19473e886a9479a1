"""What a run starts from: random weights, or a pretrained model that brings its own tokenizer."""

from dataclasses import dataclass, replace

import torch

from config import InputError, ModelConfig, Run, require
from models import SLM
from transfer import State
from utils.pretrained import Pretrained, find


@dataclass(frozen=True)
class Origin:
    """Nothing large is read before `state` is."""

    run: Run
    """With the model that there is to train, and its tokenizer."""
    pretrained: Pretrained | None = None
    fingerprint: str = ""
    """Of the pretrained model; empty where there is none."""

    @classmethod
    def of(cls, run: Run) -> "Origin":
        """Raises InputError where `init_from` names no model that can be trained here."""
        if not run.init_from:
            return cls(run)
        try:
            found = find(run.init_from)
        except InputError as error:
            raise InputError(f"init_from = {error}") from None
        most = found.config.seq_len
        require(
            run.model.seq_len <= most,
            f"model.seq_len = {run.model.seq_len}: the context of {run.init_from} is {most} tokens",
        )
        model = replace(found.config, seq_len=run.model.seq_len)
        data = replace(run.data, tokenizer=run.init_from)
        return cls(replace(run, model=model, data=data), found, found.fingerprint())

    def state(self, config: ModelConfig) -> State:
        """The model before its first step, in float32; `config` is the run's, vocabulary known."""
        if self.pretrained is None:
            torch.manual_seed(self.run.seed)
            return State.of(SLM(config))
        return State(config, self.pretrained.state(torch.float32).weights)
