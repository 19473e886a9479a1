"""The three parts of a phase: growing the model into it, training it, and saving the result."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

from config import InputError, Run
from transfer import GrowthError, TrainState, grow
from utils.checkpoint.model import Checkpoint, save_checkpoint
from utils.checkpoint.resume import PhaseEnd, TrainingProgress
from utils.generate.sampling import Sampling
from utils.generate.stories import Story, encode_prompts, format_story, write_stories
from utils.metrics.console import growth_line
from utils.metrics.history import last_metrics, read_history
from utils.optim.adamw import build_optimizer, place_state
from utils.runtime.device import total_bytes
from utils.runtime.errors import NotFinite, RunStopped
from utils.runtime.formatting import wrap_lines
from utils.runtime.signals import Stopped, defer_signals
from utils.schedule.lr import lr_at
from utils.schedule.memory import explain_out_of_memory
from utils.schedule.phases import ResolvedPhase, lr_option
from utils.training.context import RunContext
from utils.training.evaluate import evaluate_fp32
from utils.training.reporter import PhaseReporter
from utils.training.step import batches, make_train_step, step_kind

PROMPTS = ("Once upon a time", "One day", "It was a")


def grow_and_verify(state: TrainState, phase: ResolvedPhase, context: RunContext) -> TrainState:
    """Grows the model of the phase before into this phase's, and checks its function on the probe.
    `state` is consumed.

    Raises:
        RunStopped: if the function moved further than the growth allows.
    """
    growth, training = phase.growth, context.run.training
    assert growth is not None, f"{phase} does not grow"
    memory = explain_out_of_memory(phase, training.micro_batch_size)
    with memory, context.stopwatch.counting("growth"):
        if training.optimizer_state_on_growth != "carry":
            state.adam.clear()  # in place, so that nobody holds on to it
        with context.stopwatch.counting("evaluation"):
            before = evaluate_fp32(state.model(), context.valid.regular, context.eval_batch_size)
        old_params = state.config.num_params
        started, error = context.history.now(), None
        try:
            seed = context.run.seed + phase.number
            state, drift = grow(state, growth, context.probe, seed, consume=True)
        except GrowthError as exceeded:
            error, drift = exceeded, exceeded.drift
    context.record(
        phase,
        "grow",
        growth=type(growth).__name__,
        passed=error is None,
        tokens=phase.first_token,
        params_before=old_params,
        params_after=phase.config.num_params,
        growth_s=context.history.now() - started,
        valid_loss_fp32=before,
        **drift.to_json(),
    )
    if error is not None:
        raise RunStopped(f"{phase}: {error}") from error
    tqdm.write(f"\n{wrap_lines(growth_line(phase, growth, drift))}")
    if phase.init_checkpoint:
        model = TrainState(state.config, state.weights)
        initial = make_checkpoint(context.writer.copy(model), phase, context, trained=False)
        path = context.run.out / phase.init_checkpoint
        files = {path: total_bytes(initial.weights)}
        context.writer.submit(lambda: save_checkpoint(path, initial), files)
        context.record(phase, "checkpoint", path=phase.init_checkpoint, trained=False)
    return state


def train_phase(
    state: TrainState, phase: ResolvedPhase, context: RunContext, progress: TrainingProgress
) -> TrainState:
    """Trains a phase, from `progress` if that lies inside it, and returns the state it ends in."""
    training = context.run.training
    if not progress.is_inside(phase):
        started = context.phase_started_s
        progress = TrainingProgress.start_of(
            phase.number, context.history.size(), started, phase.first_token
        )
    context.kernels.wait(phase)
    with explain_out_of_memory(phase, training.micro_batch_size):
        optimizer = build_optimizer(state, training, context.dtype, phase.growth_history)
        step = make_train_step(optimizer, training, context.dtype, phase.steps - progress.step)
        reporter = PhaseReporter(phase, context, progress)
        stream = batches(
            context.corpus.train, phase, context.run.seed, context.device, progress.step
        )
        checkpointer = context.checkpointer

        def keep_point(progress: TrainingProgress) -> None:
            reporter.metrics.check(reporter.where)  # waits for the device
            if reporter.metrics.steps:  # else what `progress` holds has just been logged
                progress = progress._replace(metrics=reporter.metrics.state())
            is_end = progress.step == phase.steps
            if checkpointer is not None and not checkpointer.has(progress, is_end):
                with reporter.metrics.paused(), context.stopwatch.counting("saving"):
                    state = optimizer.snapshot()
                    end = phase_end(state, phase, context) if is_end else None
                    advice = lower_lr_advice(phase, context.run)
                    checkpointer.keep(progress, state, end, advice)

        counting = context.stopwatch.counting
        with reporter.bar, advise_lower_lr(phase, context.run), counting("steps"):
            try:
                while True:
                    context.writer.check()
                    if checkpointer and checkpointer.is_due(progress.step, phase.steps):
                        keep_point(progress)
                    reporter.report(optimizer)
                    if progress.step == phase.steps:
                        break
                    tokens = next(stream)
                    lr = lr_at(progress.step, phase, training)
                    optimizer.set_lr(lr)
                    # A signal finds the step done or not begun.
                    with defer_signals(), counting(step_kind(step)):
                        progress = reporter.advance(progress, lr, step(tokens))
            except Stopped:
                keep_point(progress)
                raise
        del step  # and with it what a captured step holds
        # A signal from here on finds the phase's end kept.
        return place_state(optimizer.into_train_state(), training, context.device)


@contextmanager
def advise_lower_lr(phase: ResolvedPhase, run: Run) -> Iterator[None]:
    """Adds to NotFinite what to change before the run goes on. One that a write has met says so
    itself: it may be of the phase before."""
    try:
        yield
    except NotFinite as error:
        if error.has_advice:
            raise
        raise NotFinite(str(error), lower_lr_advice(phase, run)) from error


def lower_lr_advice(phase: ResolvedPhase, run: Run) -> str:
    """Returns what to change in a run where a number in the phase is not finite."""
    return f"choose a lower {lr_option(phase, run)} than {phase.lr:g}"


def save_phase(state: TrainState, phase: ResolvedPhase, context: RunContext) -> None:
    """Records a trained phase, whose checkpoint is being written, with sample stories."""
    memory = explain_out_of_memory(phase, context.run.training.micro_batch_size)
    with memory, context.stopwatch.counting("samples"):
        stories = sample_stories(state, context)
    context.record(
        phase,
        "checkpoint",
        path=phase.checkpoint,
        trained=True,
        params=phase.config.num_params,
        active_params=phase.config.num_active_params,
        phase_tokens=phase.tokens,
        phase_s=context.history.now() - context.phase_started_s,
        samples=[story.prompt + story.continuation for story in stories],
        **last_metrics(read_history(context.history.path), phase.number),
    )
    if stories:
        text = "\n\n".join(map(format_story, stories))
        tqdm.write(wrap_lines(f"stories by the model of {phase}:\n\n{text}\n", indent=0))


def sample_stories(state: TrainState, context: RunContext) -> list[Story]:
    """Returns a story for each of PROMPTS that has tokens, drawn with the run's seed. On a GPU the
    model's weights are cast to the training step's dtype once; autocast would cast them anew for
    every token, which takes longer than the products."""
    length, corpus = context.run.training.sample_tokens, context.corpus
    stop_ids = corpus.special_tokens.stop_ids
    sampling, prompts = Sampling(seed=context.run.seed), []
    for prompt in PROMPTS if length else ():
        with suppress(InputError):  # a tokenizer of other texts may lack these words
            encode_prompts(corpus.tokenizer, [prompt], state.config.vocab_size)
            prompts.append(prompt)
    model = state.model()
    if context.device.type == "cuda":
        model = model.to(context.dtype)
    return write_stories(model, corpus.tokenizer, stop_ids, prompts, length, sampling)


def phase_end(state: TrainState, phase: ResolvedPhase, context: RunContext) -> PhaseEnd:
    """Returns what is written at the end of a phase."""
    checkpoint = make_checkpoint(state, phase, context, trained=True)
    return PhaseEnd(phase.checkpoint, checkpoint, is_last=phase.number == len(context.run.schedule))


def make_checkpoint(
    state: TrainState, phase: ResolvedPhase, context: RunContext, trained: bool
) -> Checkpoint:
    """Returns a checkpoint of a phase's model, before or after its training, around the tensors of
    `state`."""
    return Checkpoint(
        config=state.config,
        weights=state.weights,
        tokenizer=context.corpus.tokenizer.to_str(),
        special_tokens=context.corpus.special_tokens,
        growth_history=phase.growth_history,
        probe=context.probe.cpu(),
        phase_name=phase.name,
        tokens=context.init_source.tokens + phase.first_token + phase.tokens * trained,
        seed=context.run.seed,
        load_balance_coef=context.run.training.load_balance_coef,
        init_from=context.init_source.title,
        max_seq_len=context.init_source.max_seq_len,
    )
