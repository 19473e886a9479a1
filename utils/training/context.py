"""A run from its checks to its end: what all phases share, and the order in which it is set up."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config import InputError, Run, require
from models.ops import has_triton
from transfer import TrainState
from utils.checkpoint.background import BackgroundWriter
from utils.checkpoint.resume import (
    ResumeCheckpointer,
    ResumePoint,
    RunFingerprint,
    TrainingProgress,
    flatten_settings,
    lasting_settings,
    latest_point,
    recorded_settings,
    remove_resume_points,
    resume_or_clear,
    run_fingerprint,
    setting_changes,
)
from utils.checkpoint.run_dir import (
    check_disk,
    check_run_dir,
    explain_how_to_resume,
    how_to_train_further,
    lock_run_dir,
    software_versions,
)
from utils.data import (
    Corpus,
    ValidWindows,
    check_corpus_length,
    prepare_corpus,
    spread_windows,
    valid_windows,
)
from utils.metrics.console import change_lines, run_header, run_summary
from utils.metrics.history import HISTORY_FILE, PLOT_FILE, History, read_history, run_record
from utils.metrics.tracker import RunTracker, check_tracker
from utils.optim.adamw import place_state
from utils.plot.figure import import_matplotlib, plot
from utils.plot.live import LivePlot
from utils.runtime.atomic_io import is_newer, remove_partial_files
from utils.runtime.best_effort import BestEffort
from utils.runtime.cpu import reuse_memory_and_kernels
from utils.runtime.device import (
    choose_device,
    device_name,
    dtype_name,
    reset_peak_memory,
    training_dtype,
    use_device,
)
from utils.runtime.formatting import wrap_lines
from utils.runtime.signals import raise_on_signals
from utils.runtime.stopwatch import Stopwatch
from utils.runtime.threads import start_thread, wait_interruptibly
from utils.schedule.memory import check_memory, has_room_for_copy
from utils.schedule.phases import (
    ResolvedPhase,
    check_step_options,
    flops_per_token,
    resolve_phases,
)
from utils.text.tokenizer import wanted_vocab_size
from utils.training.init_from import InitSource
from utils.training.kernels_ahead import KernelsAhead

EVAL_TOKENS_AT_ONCE = 4_096
"""Tokens that are evaluated at a time."""
GPU_EVAL_TOKENS_AT_ONCE = 16_384
"""The same for a GPU."""
TIGHT_EVAL_TOKENS_AT_ONCE = 2_048
"""The same for a GPU whose memory is tight: with low_memory or micro-batches."""


class RunSetup(NamedTuple):
    """A run that has been checked and whose tokens are on disk, before it writes anything."""

    run: Run
    """The run, with its vocabulary known."""
    phases: list[ResolvedPhase]
    corpus: Corpus
    valid: ValidWindows
    device: torch.device
    init_source: InitSource

    def header(self) -> str:
        """Returns what the run will do, as a text for a terminal."""
        return run_header(self.run, self.phases, self.corpus, self.valid, self.device)

    def make_writer(self, stopwatch: Stopwatch) -> BackgroundWriter:
        """Returns what writes the run's files: beside the training, if the host has room for the
        copies. `stopwatch` counts the run's time."""
        return BackgroundWriter(
            in_place=not has_room_for_copy(self.phases, self.run, self.device),
            trains_on_cpu=self.device.type == "cpu",
            stopwatch=stopwatch,
        )

    def fingerprint(self) -> RunFingerprint:
        """Returns what a resumption must have in common with this run."""
        corpus, source = self.corpus.fingerprint, self.init_source.fingerprint
        return run_fingerprint(self.run, corpus, self.device, source)


@dataclass
class RunContext:
    """What all phases of a run share."""

    run: Run
    phases: list[ResolvedPhase]
    corpus: Corpus
    device: torch.device
    dtype: torch.dtype
    """The dtype of the training step's matrix products."""
    eval_batch_size: int
    """Sequences to evaluate at a time."""
    probe: Tensor
    """The frozen windows (B, T + 1) that judge each growth."""
    valid: ValidWindows
    """The windows that are evaluated, on `device`."""
    history: History
    checkpointer: ResumeCheckpointer | None
    """Keeps points to resume from, and the checkpoints of phases; None keeps none."""
    writer: BackgroundWriter
    """Writes files beside the training."""
    stopwatch: Stopwatch
    """Counts the run's time, by what it is spent on."""
    kernels: KernelsAhead
    """Compiles the kernels of the phases before they are needed."""
    live_plot: LivePlot
    init_source: InitSource
    resume_point: ResumePoint | None = None
    counted_from: int = 1
    """Number of the first phase whose time `stopwatch` counts."""
    has_told_evaluations: bool = False
    """Whether the terminal was told what share of the time evaluations take."""
    phase_started_s: float = 0.0
    """Seconds that the run had taken when the current phase began."""

    @classmethod
    def from_setup(
        cls,
        setup: RunSetup,
        history: History,
        checkpointer: ResumeCheckpointer | None = None,
        resume_point: ResumePoint | None = None,
        show_picture: Callable[[Path], None] = lambda picture: None,
        stopwatch: Stopwatch | None = None,
    ) -> "RunContext":
        """Returns the context of a run whose folder is held and whose history is open.
        `show_picture` is called with each picture that is drawn while the run goes on. `stopwatch`
        counts the time of a run without a checkpointer, which has one."""
        run, device = setup.run, setup.device
        if checkpointer:
            writer = checkpointer.writer
        else:
            writer = BackgroundWriter(in_place=True, stopwatch=stopwatch)
        probe = spread_windows(setup.corpus.valid, run.model.seq_len, run.training.probe_sequences)
        valid, dtype = setup.valid, training_dtype(run.precision, device)
        batch_size = eval_batch_size(run, device)
        left = [phase for phase in setup.phases if not phase.is_done]
        kernels = KernelsAhead(left, run.training, device, dtype, batch_size)
        return cls(
            run=run,
            phases=setup.phases,
            corpus=setup.corpus,
            device=device,
            dtype=dtype,
            eval_batch_size=batch_size,
            probe=probe.to(device),
            valid=valid._replace(
                regular=valid.regular.to(device), further=valid.further.to(device)
            ),
            history=history,
            checkpointer=checkpointer,
            writer=writer,
            stopwatch=writer.stopwatch,
            kernels=kernels,
            live_plot=LivePlot(run.out, show_picture),
            init_source=setup.init_source,
            resume_point=resume_point,
        )

    def start(self) -> tuple[TrainState, TrainingProgress]:
        """Returns the state and the progress from which the run goes on: those of its last resume
        point, or the initial ones, whose start it records."""
        if self.resume_point is None:
            self.record_start()
            state = self.init_source.initial_state(self.run.model)
            progress = TrainingProgress.start_of(phase=0)
        else:
            progress, state = self.resume_point.progress, self.resume_point.state
            self.resume_point = None  # so that the state can be freed
        return place_state(state, self.run.training, self.device), progress

    def phases_from(self, progress: TrainingProgress) -> Iterator[ResolvedPhase]:
        """Yields the phases that are left; the first of them may have begun."""
        for phase in self.phases[max(progress.phase - 1, 0) :]:
            inside = progress.is_inside(phase)
            self.begin_phase(progress.phase_started_s if inside else self.history.now())
            yield phase

    def begin_phase(self, started_s: float) -> None:
        """Notes the time at which a phase began, and measures its peak memory from here."""
        self.phase_started_s = started_s
        reset_peak_memory(self.device)

    def record(self, phase: ResolvedPhase, event: str, **values: object) -> None:
        """Writes a line about a phase into the history."""
        self.history(event, phase=phase.number, phase_name=phase.name, **values)

    def record_start(self) -> None:
        """Writes the history's first line: all that it takes to run this again."""
        run, corpus, valid, phases = self.run, self.corpus, self.valid, self.phases
        self.history(
            "run",
            config=asdict(run),
            seed=run.seed,
            started_unix_s=time.time(),
            corpus=corpus.name,
            fallback=corpus.is_fallback,
            tokenizer=corpus.tokenizer_name,
            tokenizer_fallback=corpus.has_fallback_tokenizer,
            fingerprint=corpus.fingerprint,
            init_fingerprint=self.init_source.fingerprint or None,
            train_sources=corpus.record.train,
            valid_sources=corpus.record.valid,
            left_out=corpus.record.left_out,
            null_rows=sum(corpus.record.null_rows.values()),
            is_cut=corpus.record.is_cut,
            train_documents=corpus.train_documents,
            valid_documents=corpus.valid_documents,
            train_tokens=len(corpus.train),
            valid_tokens=len(corpus.valid),
            eval_tokens=valid.tokens,
            eval_bytes=valid.text_bytes,
            eval_documents=valid.documents,
            final_eval_tokens=valid.final_tokens,
            final_eval_bytes=valid.final_text_bytes,
            final_eval_documents=valid.final_documents,
            device=device_name(self.device),
            dtype=dtype_name(self.dtype),
            phases=[phase.name for phase in phases],
            params=[phase.config.num_params for phase in phases],
            active_params=[phase.config.num_active_params for phase in phases],
            flops_per_token=[flops_per_token(phase.config) for phase in phases],
            **software_versions(),
        )

    def record_end(self) -> None:
        """Writes the history's last line, whose seconds by kind add up to its `wall_s`."""
        last, seconds = self.phases[-1], self.stopwatch.seconds()
        wall_s, kinds = sum(seconds.values()), {f"{kind}_s": s for kind, s in seconds.items()}
        self.history("end", wall_s=wall_s, tokens=last.tokens_at(last.steps), **kinds)


def eval_batch_size(run: Run, device: torch.device) -> int:
    """Returns how many sequences to evaluate at a time."""
    is_tight, tokens = run.training.low_memory or run.training.micro_batch_size, EVAL_TOKENS_AT_ONCE
    if device.type == "cuda":
        tokens = TIGHT_EVAL_TOKENS_AT_ONCE if is_tight else GPU_EVAL_TOKENS_AT_ONCE
    return max(1, tokens // run.model.seq_len)


def check_run(run: Run) -> InitSource:
    """Checks every setting of a run, before any work. Returns where its weights come from, with the
    run as that source settles it.

    Raises:
        InputError: naming the field, for anything that the run cannot be.
    """
    device = choose_device(run.device)
    reuse_memory_and_kernels()
    init_source = InitSource.from_run(run)
    phases = resolve_phases(init_source.run, init_source.growth_history)
    check_step_options(init_source.run, phases, device)
    check_tracker(run.tracker)
    if run.resume or not run.dry_run:
        check_run_dir(run, phases)
    return init_source


def prepare_run(init_source: InitSource) -> RunSetup:
    """Makes the tokens of a checked run, and settles what follows from them.

    Raises:
        InputError: if the text cannot be read, or is too short.
    """
    run = init_source.run
    device = choose_device(run.device)
    load_device(device)  # it takes as long as the tokens
    corpus = prepare_run_corpus(run)
    check_corpus_length(corpus, run.model.seq_len)
    wanted = wanted_vocab_size(corpus.tokenizer_name, run.model.vocab_size)
    vocab_size = wanted or corpus.vocab_size
    run = replace(run, model=replace(run.model, vocab_size=vocab_size))
    phases = resolve_phases(run, init_source.growth_history)
    training = run.training
    valid = valid_windows(
        corpus, run.model.seq_len, training.eval_tokens, training.final_eval_tokens
    )
    return RunSetup(run, phases, corpus, valid, device, init_source)


def load_device(device: torch.device) -> None:
    """Begins to load what the first launch on a GPU needs, before it is needed."""
    use_device(device)
    if device.type == "cuda" and has_triton():
        from models.fused.compile import load_compiler  # not in a thread, beside other imports

        start_thread(partial(load_compiler, device))


def prepare_run_corpus(run: Run) -> Corpus:
    """Returns a run's tokens. One that is resumed keeps the text and the tokenizer that `auto` came
    to be when it began, whether the hub can be reached now or not."""
    record, data = begun_run_record(run), run.data
    keeps_source, keeps_tokenizer = (
        bool(record) and choice == "auto" for choice in (data.source, data.tokenizer)
    )
    if keeps_source:
        data = replace(data, source=record["corpus"])
    if keeps_source and record["fallback"]:
        data = replace(data, config="", split="", valid_split="")
    if keeps_tokenizer:
        data = replace(data, tokenizer=record["tokenizer"])
    before = record["config"]["data"]["source"] if record else run.data.source
    if before != str(run.data.source):
        tqdm.write(f"data.source was {before} when the run began, is {run.data.source}")
    corpus = prepare_corpus(data, run.model.vocab_size, lambda text: tqdm.write(wrap_lines(text)))
    return replace(
        corpus,
        is_fallback=record["fallback"] if keeps_source else corpus.is_fallback,
        has_fallback_tokenizer=(
            record["tokenizer_fallback"] if keeps_tokenizer else corpus.has_fallback_tokenizer
        ),
    )


def begun_run_record(run: Run) -> dict:
    """Returns the history's first line of the run that is to be resumed; empty where there is
    none."""
    path = run.out / HISTORY_FILE
    return run_record(read_history(path)) if run.resume and path.exists() else {}


def announce_run(setup: RunSetup) -> None:
    """Prints what a run will do; one that is resumed says so once it knows where it goes on.

    Raises:
        InputError: if it is expected to need more memory or disk than there is.
    """
    if not setup.run.resume:
        print(setup.header())
    check_memory(setup.phases, setup.run, setup.device)
    check_disk(setup.run.out, setup.phases)


def announce_dry_run(setup: RunSetup) -> None:
    """Prints what a run would do, or what is left to do of one that is to be resumed.

    Raises:
        InputError: if it would not start: its folder may not be written, the run in there cannot go
            on, or it is expected to need more memory or disk than there is.
    """
    run, start = setup.run, "start"
    if run.resume and (point := latest_point(run.out, setup.fingerprint(), print, setup.phases)):
        setup = setup._replace(phases=point.progress.resume(setup.phases))
        start = f"go on at phase {point.progress.phase}, step {point.progress.step}"
    print(setup.header())
    try:
        check_run_dir(run, setup.phases)
        check_memory(setup.phases, run, setup.device)
        check_disk(run.out, setup.phases)
    except InputError as error:
        raise InputError(f"this run would not {start}: {error}") from None
    print(f"dry run: this run would {start}; nothing was written into {run.out}")


@contextmanager
def open_run(setup: RunSetup, started_s: float | None = None) -> Iterator[RunContext]:
    """Holds the run's folder, opens its history and its last resume point, and finishes the run
    after the last phase. Whatever stops the run says how to go on. The run's time counts from
    `started_s` by `time.perf_counter`, from now if None.

    Raises:
        InputError: if the folder cannot be written, or the run is to be resumed and cannot be.
    """
    run = setup.run
    tracker, stopwatch = RunTracker(run.tracker, run.out), Stopwatch(started_s)
    writer = setup.make_writer(stopwatch)
    # A notebook, too, interrupts between two steps.
    with raise_on_signals(), lock_run_dir(run.out), explain_how_to_resume(run.out), tracker:
        fingerprint = setup.fingerprint()
        point = resume_or_clear(run, setup.phases, fingerprint)
        stopwatch.add(point.seconds if point else {})
        length = point.progress.history_bytes if point else None
        path = run.out / HISTORY_FILE
        history = History(path, stopwatch.now, length, tracker.send_event)
        with history, writer.finished():
            is_as_kept = point is not None and not point.changes
            kept = point.progress if point and is_as_kept else None
            checkpointer = ResumeCheckpointer(run, fingerprint, history, writer, kept)
            if point:
                setup = setup._replace(phases=point.progress.resume(setup.phases))
                point = record_changes(point, setup.phases, history, checkpointer)
            if run.resume:
                lines = change_lines(read_history(history.path))
                tqdm.write("\n".join([setup.header(), *map(wrap_lines, lines)]))
            context = RunContext.from_setup(
                setup, history, checkpointer, point, tracker.send_picture
            )
            del point  # so that the loaded state can be freed
            yield context
            drawing, _ = start_thread(import_matplotlib)  # beside the last write
            writer.wait()  # the run counts as ended once its last checkpoint is on the disk
            with stopwatch.counting("reports"):
                wait_interruptibly(drawing)
            context.record_end()
            history.sync()  # before the points go, without which it could not be written again
        write_results(run)
        tracker.send_picture(run.out / PLOT_FILE, is_last=True)


def record_changes(
    point: ResumePoint,
    phases: list[ResolvedPhase],
    history: History,
    checkpointer: ResumeCheckpointer,
) -> ResumePoint:
    """Records which settings change at a point, and keeps the point anew, so that they hold from
    here on wherever the run is stopped again. Returns the point to go on from."""
    progress, state, changes, _ = point
    phase = phases[progress.phase - 1]
    for change in changes:
        history(
            "change",
            phase=phase.number,
            phase_name=phase.name,
            step=progress.step,
            tokens=progress.tokens,
            setting=change.name,
            old=change.old,
            new=change.new,
        )
    progress = progress._replace(history_bytes=history.size())
    checkpointer.keep(progress, state)
    return point._replace(progress=progress)


def check_finished_run(init_source: InitSource) -> None:
    """Raises InputError, which names what differs, unless the run that has ended in the folder is
    this one."""
    run, events = init_source.run, read_history(init_source.run.out / HISTORY_FILE)
    old, record = recorded_settings(events), run_record(events)
    before = flatten_settings(record["config"])
    sources = [
        before.get(name) == value
        for name, value in flatten_settings(asdict(run)).items()
        if name == "init_from" or (name.startswith("data.") and name != "data.cache")
    ]
    if all(sources):  # then text and model need not be read to know that they are the same
        wanted = wanted_vocab_size(record["tokenizer"], run.model.vocab_size)
        vocab_size = wanted or before["model.vocab_size"]
        run = replace(run, model=replace(run.model, vocab_size=vocab_size))
        fingerprints = record["fingerprint"], record["init_fingerprint"] or ""
        new = lasting_settings(asdict(run), *fingerprints)
    else:
        new = prepare_run(init_source).fingerprint().settings
    changes = setting_changes(old, new)
    require(
        not changes,
        f"{run.out} holds a finished run, which cannot go on as another: "
        f"{'; '.join(map(str, changes))}; this trains its model further: "
        f"{how_to_train_further(run.out, changes)}",
    )


def finish_run(init_source: InitSource) -> None:
    """Finishes a run that has ended, should something be left to do, and prints its summary and
    how to train its model further. A dry run prints the latter alone.

    Raises:
        InputError: if it is another run that has ended, or another process holds the folder.
    """
    run = init_source.run
    check_finished_run(init_source)
    if not run.dry_run:
        with lock_run_dir(run.out), explain_how_to_resume(run.out):
            write_results(run)
    print(f"\n{run.out} holds a finished run; this trains its model further:")
    print(how_to_train_further(run.out))


def write_results(run: Run) -> None:
    """Draws the curves of a run that has ended, removes what only a resumption needs, and prints a
    summary."""
    history, picture = run.out / HISTORY_FILE, run.out / PLOT_FILE
    draw = BestEffort(f"drawing {picture}", plot, print)
    if not is_newer(picture, history):
        draw([run.out])
    remove_partial_files(run.out)
    remove_resume_points(run.out)
    print(f"\n{run_summary(read_history(history))}")
    if not draw.has_failed:
        print(f"\ncurves: {picture}")
