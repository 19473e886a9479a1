"""Trains a small language model that grows as it goes: dense, mixture of experts, wider, deeper.

    python train.py [PRESET] [--field value ...]

A run is a list of phases (config.py). Before each the model may grow; the same probe tokens judge
it before and after, and the run stops where its function moved. One loop trains every phase.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Growth, Run, TrainingConfig
from models import next_token_loss
from transfer import GrowthError, State, grow
from utils.capture import Captured, is_capturable, wants_capture
from utils.cli import parse, run_command
from utils.cpu import keep_for_next_step
from utils.data import batch, check_length, prepare
from utils.device import autocast, choose_device, reset_peak_memory
from utils.errors import RunStopped
from utils.files import is_newer, sweep_parts
from utils.header import header, summary
from utils.history import HISTORY, PLOT, History, read
from utils.lab import Lab, record_start, samples, save_model
from utils.optimizer import Optimizer, home, wake
from utils.origin import Origin
from utils.output import check_disk, check_folder, claimed, explained, is_finished, within_memory
from utils.plot import plot
from utils.reporter import Reporter, loss_fp32
from utils.resume import Keeper, Place, forget, identity, resumed
from utils.schedule import Stage, check_memory, choose_step, lr_at, stages
from utils.signals import Stopped, held
from utils.spare import Spare
from utils.tracker import tracker


def main(run: Run) -> None:
    device = choose_device(run.device)
    keep_for_next_step()
    origin = Origin.of(run)
    run = origin.run
    found = stages(run)  # every phase is checked before any work
    choose_step(run, found, device)
    files = [name for stage in found for name in stage.files]
    if not run.dry_run:
        check_folder(run, files)
        if run.resume and is_finished(run.out):
            return finish(run.out)
    corpus = prepare(run.data, run.model.vocab_size, tqdm.write)
    check_length(corpus, run.model.seq_len)
    vocab_size = run.model.vocab_size or corpus.vocab_size
    run = replace(run, model=replace(run.model, vocab_size=vocab_size))
    found = stages(run)
    print(header(run, found, corpus, device))
    check_memory(found, run, device)
    check_disk(run.out, found)
    if run.dry_run:
        return None

    with claimed(run.out), explained(run.out):
        who = identity(run, corpus.fingerprint, device, origin.fingerprint)
        place, state = resumed(run, files, who) or (None, None)
        also = tracker(run.tracker, run.out)
        with History(run.out / HISTORY, length=place and place.history, also=also) as history:
            lab = Lab.of(run, found, corpus, device, history, Keeper(run, who, history, place))
            if state is None:
                record_start(lab, origin.fingerprint)
                state = origin.state(run.model)
            state = home(state, run.training, device)
            for stage in found[place.phase - 1 if place else 0 :]:
                with within_memory(stage, run.training.micro_batch_size):
                    state = run_phase(state, stage, lab, place)
                place = None
            history("end", tokens=found[-1].tokens_at(found[-1].phase.steps))
        finish(run.out)


def finish(out: Path) -> None:
    draw = Spare(f"drawing {out / PLOT}", plot, print)
    if not is_newer(out / PLOT, out / HISTORY):
        draw([out])
    sweep_parts(out)
    forget(out)
    print(f"\n{summary(read(out / HISTORY))}")
    if not draw.broken:
        print(f"\ncurves: {out / PLOT}")


def run_phase(state: State, stage: Stage, lab: Lab, place: Place | None) -> State:
    """Grows the model as the phase says, trains it, and leaves a checkpoint and samples. With a
    `place` the phase had begun before, and goes on there."""
    reset_peak_memory(lab.device)
    if place is None:
        since = lab.history.now()
        if stage.phase.grow is not None:
            state = grown(state, stage.phase.grow, stage, lab)
        place = Place.first(stage.number, lab.history, since)
    state, last = train(state, stage, lab, place)
    state = home(state, lab.run.training, lab.device)
    stories = samples(state, lab)
    save_model(state, stage, lab, stage.checkpoint, trained=True)
    lab.note(
        stage,
        "checkpoint",
        path=stage.checkpoint,
        trained=True,
        params=stage.config.num_params,
        active_params=stage.config.num_active_params,
        phase_tokens=stage.tokens,
        phase_s=lab.history.now() - place.since,
        samples=stories,
        **last,
    )
    tqdm.write("\n".join(f"  > {' '.join(text.split())}" for text in stories))
    return state


def grown(state: State, how: Growth, stage: Stage, lab: Lab) -> State:
    """The phase's model, made of the last one's. Raises RunStopped where the function moved."""
    if lab.run.training.at_growth != "carry":
        state.adam.clear()  # in place, so that nobody holds on to it
    before, old_params = loss_fp32(state.model(), lab), state.config.num_params
    began, error = lab.history.now(), None
    try:
        state, drift = grow(state, how, lab.probe, lab.run.seed + stage.number, consume=True)
    except GrowthError as broken:
        error, drift = broken, broken.drift
    lab.note(
        stage,
        "grow",
        how=type(how).__name__,
        kept=error is None,
        tokens=stage.first_token,
        params_before=old_params,
        params_after=stage.config.num_params,
        growth_s=lab.history.now() - began,
        valid_loss_fp32=before,
        **drift.finite(),
    )
    if error is not None:
        raise RunStopped(f"{stage}: {error}") from error
    allowed = f"changed the function, which may move by {how.limits.loss:g} nats"
    did = "kept the function" if how.exact else allowed
    tqdm.write(f"{stage}: {type(how).__name__} {did}: {drift}")
    if name := stage.phase.init_checkpoint:
        save_model(state, stage, lab, name, trained=False)
        lab.note(stage, "checkpoint", path=name, trained=False)
    return state


def train(state: State, stage: Stage, lab: Lab, place: Place) -> tuple[State, dict[str, float]]:
    """One phase of training, on from `place`: the State it ends in, and the last measurements."""
    phase, settings = stage.phase, lab.run.training
    optimizer = wake(state, settings, lab.dtype, stage.growth)
    step = stepper(optimizer, settings, lab.dtype, phase.steps - place.step)
    reporter = Reporter(stage, lab, place)
    stream = batches(lab.corpus.train, stage, lab.run.seed, lab.device, place.step)

    def keep(place: Place) -> None:
        reporter.meter.check(reporter.where)
        with reporter.meter.paused():
            lab.keeper.keep(place, optimizer.snapshot())

    with reporter.bar:
        try:
            while True:
                if lab.keeper.due(place.step, phase.steps):
                    keep(place)
                reporter.report(optimizer)
                if place.step == phase.steps:
                    break
                tokens = next(stream)
                optimizer.set_lr(lr_at(place.step, stage, settings))
                with held():  # a signal finds the step done or not begun
                    reporter.trained(step(tokens))
                    place = reporter.place(place)
        except Stopped:
            keep(place)
            raise
        del step  # and with it what a captured one holds
        return optimizer.rest(), reporter.last  # a signal now finds the phase's end kept


def stepper(
    optimizer: Optimizer, settings: TrainingConfig, dtype: torch.dtype, steps: int
) -> Callable[[Tensor], Tensor]:
    """What trains on windows (B, T + 1): `training_step`, captured where it pays."""
    step = partial(training_step, optimizer, settings, dtype)
    if wants_capture(settings, steps) and is_capturable(optimizer):
        return Captured(step, optimizer)
    return step


def training_step(
    optimizer: Optimizer, settings: TrainingConfig, dtype: torch.dtype, tokens_BS: Tensor
) -> Tensor:
    """One optimizer step on windows (B, T + 1). Returns the meter's MEASURES, on the device."""
    device, total = tokens_BS.device, torch.zeros(3, device=tokens_BS.device)
    for micro in tokens_BS.split(settings.micro_batch_size or len(tokens_BS)):
        share = len(micro) / len(tokens_BS)
        with autocast(device, dtype):
            out = optimizer.model(micro[:, :-1])
            losses = next_token_loss(out, micro), out.balance_loss, out.z_loss
        loss, balance, z = losses
        weighed = loss + settings.balance_coef * balance + settings.z_coef * z
        (share * weighed).backward()
        total += share * torch.stack(losses).detach()
    return torch.cat([total, optimizer.step()[None]])


def batches(
    text: np.ndarray, stage: Stage, seed: int, device: torch.device, done: int = 0
) -> Iterator[Tensor]:
    """The windows (B, T + 1) of each step after the first `done`: what they hold follows from the
    seed and the step's number in the whole run."""
    config, size = stage.config, stage.phase.batch_size
    for step in range(stage.first_step + done, stage.first_step + stage.phase.steps):
        tokens = batch(text, config.seq_len, size, seed, step)
        if device.type == "cuda":
            tokens = tokens.pin_memory()
        yield tokens.to(device, non_blocking=True)


if __name__ == "__main__":
    run_command(lambda: main(parse(sys.argv[1:])))
