"""What all phases of a run share, and what they leave behind."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from config import Run
from transfer import State
from utils.checkpoint import Checkpoint, save
from utils.data import Corpus, windows
from utils.device import device_name, training_dtype
from utils.generate import Sampling, stories
from utils.history import History
from utils.output import versions
from utils.pretrained import title
from utils.resume import Keeper
from utils.schedule import Stage, flops_per_token
from utils.sketch import Sketch

PROMPTS = ("Once upon a time", "One day", "It was a")


@dataclass(frozen=True)
class Lab:
    run: Run
    stages: list[Stage]
    corpus: Corpus
    device: torch.device
    dtype: torch.dtype
    """What matrix products of training are computed in."""
    probe: Tensor
    """The frozen windows (B, T + 1) that judge each growth."""
    valid: Tensor
    """Held-out windows (N, T + 1)."""
    history: History
    keeper: Keeper
    sketch: Sketch

    @classmethod
    def of(
        cls,
        run: Run,
        stages: list[Stage],
        corpus: Corpus,
        device: torch.device,
        history: History,
        keeper: Keeper,
    ) -> "Lab":
        length, training = run.model.seq_len, run.training
        probe = windows(corpus.valid, length, training.probe_sequences * (length + 1))
        valid = windows(corpus.valid, length, training.eval_tokens)
        dtype = training_dtype(run.precision, device)
        probe, valid = probe.to(device), valid.to(device)
        sketch = Sketch(run.out)
        return cls(run, stages, corpus, device, dtype, probe, valid, history, keeper, sketch)

    def note(self, stage: Stage, event: str, **values: object) -> None:
        """A line in the history about a phase."""
        self.history(event, phase=stage.number, phase_name=stage.name, **values)


def record_start(lab: Lab, origin: str = "") -> None:
    """The history's first line: all that it takes to run this again. `origin` is the fingerprint of
    the model that the run starts from, empty for none."""
    lab.history(
        "run",
        config=asdict(lab.run),
        seed=lab.run.seed,
        corpus=lab.corpus.name,
        fallback=lab.corpus.fallback,
        fingerprint=lab.corpus.fingerprint,
        init_fingerprint=origin or None,
        train_tokens=len(lab.corpus.train),
        valid_tokens=len(lab.corpus.valid),
        device=device_name(lab.device),
        dtype=str(lab.dtype).removeprefix("torch."),
        phases=[stage.name for stage in lab.stages],
        params=[stage.config.num_params for stage in lab.stages],
        active_params=[stage.config.num_active_params for stage in lab.stages],
        flops_per_token=[flops_per_token(stage.config) for stage in lab.stages],
        **versions(),
    )


def samples(state: State, lab: Lab) -> list[str]:
    """A story for each of PROMPTS, drawn with the run's seed and in the weights' own precision:
    casting them for every token would take longer than the products."""
    length, corpus = lab.run.training.sample_tokens, lab.corpus
    prompts, sampling = PROMPTS if length else (), Sampling(seed=lab.run.seed)
    return stories(state.model(), corpus.tokenizer, corpus.eos, prompts, length, sampling)


def save_model(state: State, stage: Stage, lab: Lab, name: str, trained: bool) -> None:
    checkpoint = Checkpoint(
        config=state.config,
        weights=state.weights,
        tokenizer=lab.corpus.tokenizer.to_str(),
        eos=lab.corpus.eos,
        growth=stage.growth,
        probe=lab.probe,
        phase_name=stage.name,
        tokens=stage.first_token + stage.tokens * trained,
        seed=lab.run.seed,
        balance_coef=lab.run.training.balance_coef,
        init_from=title(lab.run.init_from),
    )
    save(lab.run.out / name, checkpoint)
