"""What a run says of itself: before it starts, how long it will take, and how it ended."""

import torch

from config import Run
from models import fused
from utils.capture import wants_capture
from utils.data import Corpus
from utils.device import device_name, training_dtype
from utils.history import settled
from utils.schedule import Stage, stage_memory_gb
from utils.units import duration, short

LONG_S = 3600.0
SPIKE = 0.02
"""Nats above the loss before a growth that are worth a word."""

Rows = list[tuple[str, ...]]


def header(run: Run, found: list[Stage], corpus: Corpus, device: torch.device) -> str:
    """One line per phase: what is trained, on how much, and the memory it is expected to need."""
    tokens = f"{short(len(corpus.train))} training and {short(len(corpus.valid))} held-out tokens"
    name = "BUILT-IN STORIES (no hub)" if corpus.fallback else corpus.name
    origin = [f"start   {run.init_from}, with its own tokenizer"] if run.init_from else []
    lines = [
        *origin,
        f"data    {name}, {tokens}, vocabulary {corpus.vocab_size:,}",
        f"device  {device_name(device)}, {way(run, found, device)}",
        f"output  {run.out}, seed {run.seed}",
        "",
    ]
    rows: Rows = [
        ("phase", "model", "parameters", "tokens", "batch x context", "peak lr", "memory")
    ]
    rows += [describe(stage, run, device) for stage in found]
    return "\n".join([*lines, *table(rows), ""])


def way(run: Run, found: list[Stage], device: torch.device) -> str:
    """How the training step is computed."""
    settings, dtype = run.training, training_dtype(run.precision, device)
    if not fused.available(device, dtype):
        return "bf16 autocast" if dtype == torch.bfloat16 else "fp32"
    if settings.lean:
        return "bf16, fused kernels, lean optimizer"
    phases = [str(s.number) for s in found if wants_capture(settings, s.phase.steps)]
    graph = f"one CUDA graph a step in phases {', '.join(phases)}" if phases else "no CUDA graph"
    return f"bf16, fused kernels, {graph}"


def describe(stage: Stage, run: Run, device: torch.device) -> tuple[str, ...]:
    config, phase = stage.config, stage.phase
    kind = f"{config.num_experts} experts, top-{config.top_k}" if config.num_experts else "dense"
    return (
        f"{stage.number} {stage.name}",
        f"{config.n_layers} x {config.d_model}, {kind}",
        parameters(config.num_params, config.num_active_params),
        short(stage.tokens),
        f"{phase.batch_size} x {config.seq_len}",
        f"{phase.lr:g}",
        f"{stage_memory_gb(stage, run, device):.1f} GB",
    )


def table(rows: Rows) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return lines


def parameters(total: int, active: int) -> str:
    return short(total) if active == total else f"{short(active)} of {short(total)}"


def progress(stage: Stage, step: int, last: dict[str, float], above_growth: float | None) -> str:
    parts = [f"{stage} step {step}/{stage.phase.steps}", f"valid {last['valid_loss']:.3f}"]
    if "loss" in last:
        parts += [f"train {last['loss']:.3f}", f"{short(last['tokens_per_s'])} tokens/s"]
    if above_growth is not None and above_growth > SPIKE:
        parts.append(f"({above_growth:.3f} above what it was before the growth)")
    return "  ".join(parts)


def estimate(found: list[Stage], seconds_per_flop: float) -> str:
    """The time that training will take if every phase computes as fast as the first steps did."""
    seconds = [stage.flops * seconds_per_flop for stage in found]
    parts = ", ".join(
        f"{stage.name} {duration(s)}" for stage, s in zip(found, seconds, strict=True)
    )
    line = f"about {duration(sum(seconds))} of training to come ({parts})"
    if sum(seconds) > LONG_S:
        line += (
            "\nThat is long. `train.py tiny` shows every phase in about a minute; "
            "--training.steps-phase1 ... 4 shorten the phases; a GPU is 100 times faster."
        )
    return line


def summary(events: list[dict]) -> str:
    """Losses per phase and what each transition moved, from a run's history."""
    phases: Rows = [
        ("phase", "parameters", "tokens", "train loss", "valid loss", "seconds", "memory")
    ]
    grown: Rows = [
        ("transition", "loss before", "loss after", "drift", "logits", "flipped", "twins", "then")
    ]
    for event in events:
        if event["event"] == "checkpoint" and event["trained"]:
            phases.append(phase_row(event))
        elif event["event"] == "grow":
            grown.append((*transition_row(event), then(event, events)))
    return "\n".join(table(phases) + (["", *table(grown)] if len(grown) > 1 else []))


def phase_row(event: dict) -> tuple[str, ...]:
    memory = event.get("peak_memory_gb")
    return (
        f"{event['phase']} {event['phase_name']}",
        parameters(event["params"], event["active_params"]),
        short(event["phase_tokens"]),
        f"{event['loss']:.3f}" if "loss" in event else "-",
        f"{event['valid_loss']:.3f}",
        f"{event['phase_s']:.0f}",
        f"{memory:.1f} GB" if memory is not None else "-",
    )


def then(grow: dict, events: list[dict]) -> str:
    """How far the held-out loss, in float32, was above what it had been, after so many steps."""
    above = settled(events, grow["phase"])
    return ", ".join(f"{loss:+.3f} at {step}" for step, loss in above.items())


def transition_row(event: dict) -> tuple[str, ...]:
    twins = event["twin_distance"]
    return (
        f"{event['how']} -> {event['phase_name']}",
        f"{event['loss_before']:.6f}",
        f"{event['loss_after']:.6f}",
        f"{event['loss_drift']:.1e}",
        f"{event['max_logit_diff']:.1e}",
        f"{event['flipped']} of {event['probe_tokens']}",
        f"{twins:.3f}" if twins is not None else "-",
    )
