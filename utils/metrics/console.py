"""What a run prints about itself: before it starts, while it trains, and when it has ended."""

from collections.abc import Mapping, Sequence

import torch

from config import Growth, Run
from models.ops import fused_kernels_available
from transfer import FunctionDrift
from transfer.checks import resolve_tolerance
from utils.data import Corpus, ValidWindows
from utils.metrics.diagnostics import UNDERUSED_SHARE
from utils.metrics.history import select_events, settling_losses, time_spent
from utils.optim.adamw import lr_scale_range
from utils.optim.cuda_graph import wants_cuda_graph
from utils.runtime.device import device_name, training_dtype
from utils.runtime.formatting import (
    TableRows,
    count_noun,
    format_architecture,
    format_count,
    format_duration,
    format_gb,
    format_markdown_table,
    format_number,
    format_params,
    format_table,
    join_parts,
    list_some,
    wrap_lines,
)
from utils.schedule.memory import phase_memory_gb
from utils.schedule.phases import ResolvedPhase

LONG_RUN_S = 3600.0
NOTABLE_EXCESS = 1.5
"""How many times `data.valid_fraction` of the text may be held out without a word."""
USEFUL_PASSES = 4
"""How often text can be read again before it teaches much less than new text would
(arXiv:2305.16264)."""
NOTABLE_RISE = 0.02
"""Nats above the loss before a growth that are worth a word."""
GROWTH_LEGEND = """
probe before, after: loss on the probe, a fixed piece of the validation text
drift, logits: change of that loss, and the largest change of any logit
in float32: largest change of a logit when both models compute in float32
flipped: tokens of the probe that went to other experts than before
copies: how far copied units are from their originals (0: still equal)
step N: validation loss N steps after the growth, minus that before it
""".strip()
"""What the columns of the table of growths mean."""
GROWTH_COLUMNS = (
    *("growth", "probe before", "probe after", "drift", "logits", "in float32"),
    *("flipped", "copies"),
)
MIN_BAR_WIDTH = 8
SMALLEST_SHARE = 0.005
"""Share of a run's time from which it is told apart."""
USUAL_EVALUATION_SHARE = 0.03
"""Largest share of a phase's time that evaluations take without a word."""


def run_header(
    run: Run,
    phases: list[ResolvedPhase],
    corpus: Corpus,
    valid_windows: ValidWindows,
    device: torch.device,
) -> str:
    """Returns what will run: the text and what is evaluated of it, the device, and a line per phase
    with its model, its length and the memory it is expected to need."""
    start = [("start", f"{run.init_from}, with its own tokenizer")] if run.init_from else []
    items = [
        *start,
        ("data", size_line(corpus)),
        ("", tokenizer_line(corpus)),
        *(("", line) for line in text_lines(corpus, run.data.valid_fraction)),
        *(("", line) for line in passes_lines(phases, len(corpus.train))),
        ("eval", evaluation_line(valid_windows, corpus)),
        ("device", f"{device_name(device)}, {step_description(run, phases, device)}"),
        ("output", f"{run.out}, seed {run.seed}"),
    ]
    lines = [*(wrap_lines(f"{label:<8}{text}", indent=8) for label, text in items), ""]
    rows: TableRows = [
        ("phase", "model", "parameters", "memory", "tokens", "batch x context", "peak lr")
    ]
    rows += [phase_row(phase, run, device) for phase in phases]
    return "\n".join([*lines, *format_table(rows), ""])


def size_line(corpus: Corpus) -> str:
    """Returns which text is read and how much of it there is, as a line."""
    name = "BUILT-IN STORIES (no hub)" if corpus.is_fallback else corpus.name
    files = len(corpus.record.train + corpus.record.valid)
    is_path = corpus.name not in ("builtin", "tinystories") and not corpus.name.startswith("hub:")
    counts = [count_noun(files, "file")] if is_path else []
    documents = corpus.train_documents + corpus.valid_documents - corpus.record.splits_document
    counts.append(count_noun(documents, "document"))
    train, valid = format_number(len(corpus.train)), format_number(len(corpus.valid))
    return f"{name}: {', '.join(counts)}, {train} training and {valid} validation tokens"


def tokenizer_line(corpus: Corpus) -> str:
    """Returns which tokenizer there is, as a line."""
    if corpus.has_fallback_tokenizer:
        return f"LEARNED VOCABULARY (no hub), {corpus.vocab_size:,} tokens in place of gpt2's"
    return f"vocabulary of {corpus.vocab_size:,} tokens: {corpus.tokenizer_name}"


def text_lines(corpus: Corpus, valid_fraction: float) -> list[str]:
    """Returns what the text is made of, and what of it is missing, as lines."""
    record, valid = corpus.record, corpus.valid_documents
    share = len(corpus.valid) / (len(corpus.train) + len(corpus.valid))
    if record.valid:
        held_out = list_some(record.valid)
    elif record.splits_document:
        held_out = f"the end of it, {share:.1%} of the tokens"
    else:
        documents = corpus.train_documents + valid
        held_out = f"{valid:,} of its {documents:,} documents, {share:.1%} of the tokens"
        if share > NOTABLE_EXCESS * valid_fraction:
            held_out += f" (data.valid_fraction = {valid_fraction:g}, but documents are kept whole)"
    lines = [f"training text: {list_some(record.train)}; validation text: {held_out}"]
    if record.left_out:
        lines.append(f"left out, {len(record.left_out):,}: {list_some(record.left_out)}")
    for encoding in sorted(set(record.encodings.values())):
        files = [file for file, name in record.encodings.items() if name == encoding]
        lines.append(f"read as {encoding}, {len(files):,}: {list_some(files)}")
    if rows := sum(record.null_rows.values()):
        lines.append(f"left out, {rows:,} rows without a text")
    if record.is_cut:
        counts = f"{corpus.train_documents:,} training and {valid:,} validation stories"
        lines.append(f"cut after {counts} (data.num_stories): there are more")
    return lines


def passes_lines(phases: list[ResolvedPhase], train_tokens: int) -> list[str]:
    """Returns how often a run reads its training text, all of it and by phase, and a word where
    that is too often, as lines. What is done when a run is resumed is told as a whole."""
    last, current = phases[-1], next(phase for phase in phases if not phase.is_done)
    passes = last.tokens_at(last.steps) / train_tokens
    done = [("before", current.first_token)] if current is not phases[0] else []
    left = [(phase.name, phase.tokens) for phase in phases if not phase.is_done]
    parts = (f"{name} {format_count(tokens / train_tokens)}" for name, tokens in [*done, *left])
    by_phase = f": {', '.join(parts)}" if len(phases) > 1 else ""
    lines = [f"the run reads the training text {format_count(passes)} times{by_phase}"]
    if passes > USEFUL_PASSES:
        lines.append(
            f"MORE THAN {USEFUL_PASSES} TIMES: the model comes to know the text by heart; more "
            "text, or shorter phases, serve it better"
        )
    return lines


def evaluation_line(windows: ValidWindows, corpus: Corpus) -> str:
    """Returns how much of the validation text is evaluated."""
    documents = count_noun(corpus.valid_documents, "validation document")
    return (
        f"{windows.tokens:,} tokens from {windows.documents:,} of the {documents} each time, "
        f"{windows.final_tokens:,} from "
        f"{windows.final_documents:,} at the end of a phase"
    )


def step_description(run: Run, phases: list[ResolvedPhase], device: torch.device) -> str:
    """Returns how the training step is computed, in words."""
    training, dtype = run.training, training_dtype(run.precision, device)
    config = phases[-1].config
    if not (training.fused_kernels and fused_kernels_available(config, device, dtype)):
        return "bf16 autocast" if dtype == torch.bfloat16 else "fp32"
    if training.low_memory:
        return "bf16, fused kernels, low-memory optimizer"
    captured = [str(p.number) for p in phases if wants_cuda_graph(training, p.steps)]
    if not captured:
        return "bf16, fused kernels, no CUDA graph"
    return f"bf16, fused kernels, one CUDA graph a step in phases {', '.join(captured)}"


def phase_row(phase: ResolvedPhase, run: Run, device: torch.device) -> tuple[str, ...]:
    """Returns a phase's row in the header. Where parameters have different learning rates, as after
    widening, it shows the lowest and the highest peak. Of a phase that is done it shows the model
    alone."""
    config = phase.config
    model = (
        f"{phase.number} {phase.name}",
        format_architecture(config),
        format_params(config.num_params, config.num_active_params),
    )
    if phase.is_done:
        return (*model, "-", "done", "-", "-")
    lr_factors = lr_scale_range(config, run.training, phase.growth_history)
    return (
        *model,
        format_gb(phase_memory_gb(phase, run, device)),
        format_number(phase.tokens),
        f"{phase.batch_size} x {config.seq_len}",
        " to ".join(dict.fromkeys(f"{factor * phase.lr:.3g}" for factor in lr_factors)),
    )


def growth_line(phase: ResolvedPhase, growth: Growth, drift: FunctionDrift) -> str:
    """Returns what a growth did to the model's function, as a line."""
    _, max_loss_drift = resolve_tolerance(growth, 0.0)
    changed = f"changed the function, which may move by {max_loss_drift:g} nats"
    effect = "kept the function" if growth.is_exact else changed
    return f"{phase}: {type(growth).__name__} {effect}: probe {drift}"


def progress_line(
    phase: ResolvedPhase, step: int, last: dict[str, float], above_growth: float | None
) -> str:
    """Returns an evaluation as a line, given the last metrics and how far the loss is above that
    before the phase's growth."""
    parts = [f"{phase} {step}/{phase.steps}", f"valid loss {last['valid_loss']:.3f}"]
    if "loss" in last:
        parts += [f"train loss {last['loss']:.3f}", format_speed(last["tokens_per_s"])]
    if above_growth is not None and above_growth > NOTABLE_RISE:
        parts.append(f"(valid loss {above_growth:.3f} above that before the growth)")
    return join_parts(parts)


def format_speed(tokens_per_s: float) -> str:
    """Returns a speed: `26.8 k tokens/s`."""
    return f"{format_number(tokens_per_s)} tokens/s"


def bar_format(phase: ResolvedPhase, width: int) -> str:
    """Returns tqdm's format of a phase's progress bar in so many columns. The loss, the speed and
    the time left, which are tqdm's postfix, always have room; the phase's name, the number of
    steps and the bar itself have if the terminal is wide enough."""
    room = width - len(", loss 12.345, 26.8 k tokens/s, 99:59:59 left")
    name = str(phase) if len(str(phase)) <= room else f"phase {phase.number}"
    room -= len(name)
    steps = f" {phase.steps}/{phase.steps}"
    wanted = [" {n_fmt}/{total_fmt}"] if len(steps) <= room else []
    wanted += [" {bar}"] if len(steps) + MIN_BAR_WIDTH < room else []
    literal = name.replace("{", "{{").replace("}", "}}")
    return "".join([literal, "{postfix}", *wanted])


def underused_line(
    phase: ResolvedPhase, underused: list[tuple[int, int]], load_balance_coef: float
) -> str:
    """Returns which experts, as pairs (layer, expert), get too few tokens, what that means and what
    helps, as a line."""
    experts = list_some(f"expert {expert} of layer {layer}" for layer, expert in underused)
    get = "gets" if len(underused) == 1 else "get"
    return (
        f"{phase}: {experts} {get} less than {UNDERUSED_SHARE:.0%} of an equal share of the tokens "
        f"and so learn{'s' * (len(underused) == 1)} little. Often this passes; if it lasts, a "
        f"higher --training.load-balance-coef (now {load_balance_coef:g}) spreads the tokens."
    )


def estimate_line(phases: Sequence[ResolvedPhase], left: Sequence[Mapping[str, float]]) -> str:
    """Returns the time that the rest of a run will take, of which steps are only a part, as a line.

    Args:
        phases: The phases that are left.
        left: The seconds to come of each, by kind.
    """
    seconds = [sum(kinds.values()) for kinds in left]
    pairs = zip(phases, seconds, strict=True)
    parts = ", ".join(f"{phase.name} {format_duration(s)}" for phase, s in pairs)
    line = f"about {format_duration(sum(seconds))} to come ({parts})"
    if sum(seconds) > LONG_RUN_S:
        line += (
            "\nThat is long. `train.py tiny` shows every phase in half a minute; "
            "--training.steps-phase1 ... 4 shorten the phases; a GPU is 100 times faster."
        )
    return line


def evaluation_share_line(
    phases: Sequence[ResolvedPhase], left: Sequence[Mapping[str, float]]
) -> str:
    """Returns which phases will spend more than USUAL_EVALUATION_SHARE of their time on
    evaluations, and what helps, as a line; nothing where none will. See `estimate_line`."""
    shares = [kinds["evaluation"] / sum(kinds.values()) for kinds in left]
    parts = [
        f"{share:.0%} of {phase.name}"
        for phase, share in zip(phases, shares, strict=True)
        if share > USUAL_EVALUATION_SHARE
    ]
    if not parts:
        return ""
    return (
        f"evaluations take about {', '.join(parts)}; a higher --training.eval-every, or fewer "
        "--training.eval-tokens and --training.final-eval-tokens, leave more for the steps"
    )


def time_line(seconds: Mapping[str, float]) -> str:
    """Returns what a run's seconds were spent on, by kind, as a line; the largest part first."""
    whole = sum(seconds.values())
    parts = [
        f"{kind} {format_duration(s)} ({s / whole:.0%})"
        for kind, s in sorted(seconds.items(), key=lambda item: -item[1])
        if s >= SMALLEST_SHARE * whole
    ]
    return f"{format_duration(whole)} in all: {', '.join(parts)}"


def change_lines(events: list[dict]) -> list[str]:
    """Returns a line for each setting that was changed when a run was resumed, from its history."""
    return [
        f"changed {event['setting']} from {event['old']} to {event['new']} "
        f"at phase {event['phase']} ({event['phase_name']}), step {event['step']}"
        for event in select_events(events, "change")
    ]


def run_summary(events: list[dict]) -> str:
    """Returns the losses of each phase, what each growth moved and what that means, and which
    settings were changed on the way, from a run's history, in tables for a terminal."""
    parts = [format_table(trained_rows(events))]
    if grows := select_events(events, "grow"):
        settled = [settling_losses(events, grow["phase"]) for grow in grows]
        steps = sorted({step for losses in settled for step in losses})
        rows: TableRows = [(*GROWTH_COLUMNS, *(f"step {step}" for step in steps))]
        for grow, losses in zip(grows, settled, strict=True):
            later = (format_measured(losses.get(step), "+.3f") for step in steps)
            rows.append((*growth_row(grow), *later))
        parts += [format_table(rows), [GROWTH_LEGEND]]
    parts.append(change_lines(events))
    parts += [[time_line(s)] for end in select_events(events, "end") if (s := time_spent(end))]
    return wrap_lines("\n\n".join("\n".join(lines) for lines in parts if lines))


def run_report(events: list[dict]) -> str:
    """Returns what `run_summary` does, but for the meaning, in Markdown."""
    parts = [format_markdown_table(trained_rows(events))]
    if grows := select_events(events, "grow"):
        rows = [(*growth_row(grow), settling_cell(grow, events)) for grow in grows]
        parts.append(format_markdown_table([(*GROWTH_COLUMNS, "then"), *rows]))
    parts.append(change_lines(events))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def trained_rows(events: list[dict]) -> TableRows:
    """Returns a head, and a row per trained phase, from a run's history. A device whose memory is
    not measured leaves that column out."""
    head = ("phase", "parameters", "tokens", "train loss", "valid loss", "seconds", "memory")
    trained = [event for event in select_events(events, "checkpoint") if event["trained"]]
    is_measured = any("peak_memory_gb" in event for event in trained)
    rows = [head, *map(trained_row, trained)]
    return rows if is_measured else [row[:-1] for row in rows]


def trained_row(event: dict) -> tuple[str, ...]:
    """Returns a trained phase's row in the summary."""
    seconds, memory = event["phase_s"], event.get("peak_memory_gb")
    return (
        f"{event['phase']} {event['phase_name']}",
        format_params(event["params"], event["active_params"]),
        format_number(event["phase_tokens"]),
        f"{event['loss']:.3f}" if "loss" in event else "-",
        f"{event['final_valid_loss']:.3f}",
        f"{seconds:.0f}" if seconds >= 1 else f"{seconds:.1g}",
        format_gb(memory) if memory is not None else "-",
    )


def settling_cell(grow: dict, events: list[dict]) -> str:
    """Returns how far the validation loss was above that before the growth, by steps."""
    above = settling_losses(events, grow["phase"])
    return ", ".join(f"{loss:+.3f} at {step}" for step, loss in above.items())


def growth_row(event: dict) -> tuple[str, ...]:
    """Returns a growth's row in the summary, without the losses that followed."""
    return (
        f"{event['growth']} -> {event['phase_name']}",
        format_measured(event["loss_before"], ".6f"),
        format_measured(event["loss_after"], ".6f"),
        format_measured(event["loss_drift"], ".1e"),
        format_measured(event["max_logit_diff"], ".1e"),
        format_measured(event["max_logit_diff_fp32"], ".1e"),
        f"{event['flipped']} of {event['probe_tokens']}",
        format_measured(event["copy_distance"], ".3f"),
    )


def format_measured(value: float | None, spec: str) -> str:
    """Returns a value in a format, or a dash for one that was not measured or not finite."""
    return "-" if value is None else f"{value:{spec}}"
