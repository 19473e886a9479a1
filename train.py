"""Trains a small language model that grows as it goes: dense, mixture of experts, wider, deeper.

    python train.py [PRESET] [--field value ...]

A run is a list of phases (config.py). Before each the model may grow; the same probe tokens judge
it before and after, and the run stops where its function moved. One loop trains every phase.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from config import Phase, Run, TrainingConfig
from models import SLM, next_token_loss
from transfer import GrowthError, State, grow
from utils.cli import RunStopped, parse, run_command
from utils.data import batch, check_length, prepare, windows
from utils.device import autocast, choose_device, reset_peak_memory, training_dtype
from utils.header import header, progress, summary
from utils.history import History, read
from utils.lab import Lab, record_start, samples, save_model
from utils.meter import Forecast, Meter, check_finite
from utils.optimizer import rest, wake
from utils.output import HISTORY, PLOT, check_folder, open_folder
from utils.plot import plot
from utils.schedule import Stage, stages

EVAL_SEQUENCES = 8

Note = Callable[..., None]
"""Writes a line to the history, with the phase filled in."""


def main(run: Run) -> None:
    device = choose_device(run.device)
    dtype = training_dtype(run.precision, device)
    stages(run)  # every phase is checked before any work
    check_folder(run.out, run.overwrite)
    corpus = prepare(run.data, run.model.vocab_size, tqdm.write)
    check_length(corpus, run.model.seq_len)
    vocab_size = run.model.vocab_size or corpus.vocab_size
    run = replace(run, model=replace(run.model, vocab_size=vocab_size))
    found = stages(run)
    print(header(run, found, corpus, device, dtype))
    if run.dry_run:
        return

    open_folder(run.out, [name for stage in found for name in stage.files])
    with History(run.out / HISTORY) as history:
        length, training = run.model.seq_len, run.training
        probe = windows(corpus.valid, length, training.probe_sequences * (length + 1)).to(device)
        valid = windows(corpus.valid, length, training.eval_tokens).to(device)
        lab = Lab(run, found, corpus, device, dtype, probe, valid, history)
        record_start(lab)
        torch.manual_seed(run.seed)
        state = State.of(SLM(run.model).to(device))
        for stage in found:
            state = run_phase(state, stage, lab)
        history("end", tokens=found[-1].first_token + found[-1].tokens)
    plot([run.out])
    print(f"\n{summary(read(run.out / HISTORY))}\n\ncurves: {run.out / PLOT}")


def run_phase(state: State, stage: Stage, lab: Lab) -> State:
    """Grows the model as the phase says, trains it, and leaves a checkpoint and samples."""
    note = partial(lab.history, phase=stage.number, phase_name=stage.name)
    reset_peak_memory(lab.device)
    started = time.perf_counter()
    if stage.phase.grow is not None:
        state = grown(state, stage, lab, note)
    state, last = train(state, stage, lab, note)
    stories = samples(state, lab)
    save_model(state, stage, lab, stage.checkpoint, trained=True)
    note(
        "checkpoint",
        path=stage.checkpoint,
        trained=True,
        params=stage.config.num_params,
        active_params=stage.config.num_active_params,
        phase_tokens=stage.tokens,
        phase_s=time.perf_counter() - started,
        samples=stories,
        **last,
    )
    tqdm.write("\n".join(f"  > {text}" for text in stories))
    return state


def grown(state: State, stage: Stage, lab: Lab, note: Note) -> State:
    """The phase's model, made of the last one's. Raises RunStopped where the function moved."""
    how, old_params = stage.phase.grow, state.config.num_params
    assert how is not None
    started = time.perf_counter()
    try:
        state, drift = grow(state, how, lab.probe, lab.run.seed + stage.number, consume=True)
    except GrowthError as error:
        raise RunStopped(f"{stage}: {error}; the model from before it is kept") from error
    note(
        "grow",
        how=type(how).__name__,
        tokens=stage.first_token,
        params_before=old_params,
        params_after=state.config.num_params,
        growth_s=time.perf_counter() - started,
        **asdict(drift),
    )
    tqdm.write(
        f"{stage}: {type(how).__name__} kept the loss at {drift.loss_after:.6f} (moved by "
        f"{drift.loss_drift:.1e}), logits within {drift.max_logit_diff:.1e}"
    )
    if stage.phase.init_checkpoint:
        save_model(state, stage, lab, stage.phase.init_checkpoint, trained=False)
        note("checkpoint", path=stage.phase.init_checkpoint, trained=False)
    return state


def train(state: State, stage: Stage, lab: Lab, note: Note) -> tuple[State, dict[str, float]]:
    """One phase of training: the State it ends in, and the last measurements."""
    settings, phase = lab.run.training, stage.phase
    model, optimizer = wake(state, settings)
    meter = Meter(lab.device, phase.batch_size * stage.config.seq_len)
    forecast = Forecast(lab.stages, lab.device) if stage.number == 1 else None
    last: dict[str, float] = {}

    def measure(step: int) -> None:
        with meter.paused():
            loss, load = evaluate(model, lab)
        last["valid_loss"] = loss
        check_finite(last, f"{stage}, step {step}")
        note("eval", step=step, tokens=stage.tokens_at(step), valid_loss=loss, **load)
        tqdm.write(progress(stage, step, last))

    measure(0)
    with tqdm(total=phase.steps, desc=str(stage), unit="step", disable=None) as bar:
        for step, tokens in enumerate(batches(stage, lab), 1):
            lr = lr_at(step - 1, phase, settings)
            meter.add(training_step(model, optimizer, tokens, lr, lab))
            bar.update()
            if step % settings.log_every == 0 or step == phase.steps:
                measured = meter.read(f"{stage}, step {step}")
                note("step", step=step, tokens=stage.tokens_at(step), lr=lr, **measured)
                bar.set_postfix(loss=measured["loss"], tokens_per_s=measured["tokens_per_s"])
                last |= measured
            if step % settings.eval_every == 0 or step == phase.steps:
                measure(step)
            if forecast and (line := forecast.after(step)):
                tqdm.write(line)
    return rest(model, optimizer), last


def training_step(
    model: SLM, optimizer: torch.optim.AdamW, tokens_BS: Tensor, lr: float, lab: Lab
) -> Tensor:
    """One optimizer step on windows (B, T + 1). Returns the meter's MEASURES, on the device."""
    settings = lab.run.training
    total = torch.zeros(3, device=lab.device)
    for micro in tokens_BS.split(settings.micro_batch_size or len(tokens_BS)):
        share = len(micro) / len(tokens_BS)
        loss, balance, z = losses = compute_losses(model, micro, lab)
        weighed = loss + settings.balance_coef * balance + settings.z_coef * z
        (share * weighed).backward()
        total += share * torch.stack(losses).detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return torch.cat([total, norm[None]])


def compute_losses(model: SLM, tokens_BS: Tensor, lab: Lab) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, balance loss and z-loss."""
    with autocast(lab.device, lab.dtype):
        out = model(tokens_BS[:, :-1])
        return next_token_loss(out.logits, tokens_BS), out.balance_loss, out.z_loss


def lr_at(step: int, phase: Phase, settings: TrainingConfig) -> float:
    """Linear warm-up, then a cosine down to the floor: every phase warms up anew."""
    warm = round(settings.warmup * phase.steps)
    if step < warm:
        return phase.lr * (step + 1) / warm
    done = (step - warm) / max(1, phase.steps - warm)
    floor = settings.lr_floor
    return phase.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def batches(stage: Stage, lab: Lab) -> Iterator[Tensor]:
    """The windows (B, T + 1) of each step, a function of the seed and the step in the whole run."""
    config, size = stage.config, stage.phase.batch_size
    for step in range(stage.first_step, stage.first_step + stage.phase.steps):
        tokens = batch(lab.corpus.train, config.seq_len, size, lab.run.seed, step)
        if lab.device.type == "cuda":
            tokens = tokens.pin_memory()
        yield tokens.to(lab.device, non_blocking=True)


@torch.no_grad()
def evaluate(model: SLM, lab: Lab) -> tuple[float, dict[str, list]]:
    """Loss on the held-out windows, and the share of choices that each layer's experts got."""
    loss = torch.zeros((), device=lab.device)
    loads = []
    for rows in lab.valid.split(EVAL_SEQUENCES):
        share = len(rows) / len(lab.valid)
        with autocast(lab.device, lab.dtype):
            out = model(rows[:, :-1])
            loss += share * next_token_loss(out.logits, rows)
        if out.routing:
            loads.append(share * torch.stack([layer.load_E for layer in out.routing]))
    load = {"expert_load": torch.stack(loads).sum(0).tolist()} if loads else {}
    return loss.item(), load


if __name__ == "__main__":
    run_command(lambda: main(parse(sys.argv[1:])))
