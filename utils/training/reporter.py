"""What a phase says of itself while it trains: lines in the history, evaluations, a progress
bar."""

import torch
from torch import Tensor
from tqdm import tqdm

from models.layerwise import layerwise_model
from utils.checkpoint.resume import TrainingProgress
from utils.metrics.console import (
    bar_format,
    estimate_line,
    evaluation_share_line,
    format_speed,
    progress_line,
    underused_line,
)
from utils.metrics.diagnostics import copied_matrices, underused_experts, weight_stats
from utils.metrics.forecast import ByKind, Forecast
from utils.metrics.history import (
    SETTLING_STEPS,
    loss_above_growth,
    phase_events,
    read_history,
)
from utils.metrics.throughput import MetricAccumulator, StepTimer, check_finite
from utils.optim.adamw import Optimizer, lr_scale_range
from utils.runtime.formatting import LINE_WIDTH, wrap_lines
from utils.schedule.phases import ResolvedPhase
from utils.training.context import RunContext
from utils.training.evaluate import evaluate, evaluate_fp32


class PhaseReporter:
    """Reports on the phase that goes on from `progress`."""

    def __init__(self, phase: ResolvedPhase, context: RunContext, progress: TrainingProgress):
        self.phase, self.context, self.step, self.lr = phase, context, progress.step, progress.lr
        self.counting = context.stopwatch.counting
        self.metrics = MetricAccumulator(context.device, phase.tokens_per_step, progress.metrics)
        self.timer = StepTimer(context.device, context.stopwatch)
        self.forecast = Forecast(
            context.phases,
            context.run.training,
            context.valid,
            context.device,
            context.dtype,
            context.counted_from,
        )
        self.events = phase_events(read_history(context.history.path), phase.number)
        self.lr_scale_range = lr_scale_range(
            phase.config, context.run.training, phase.growth_history
        )
        grown_before = len(context.init_source.growth_history)
        growths = phase.growth_history[grown_before:]
        self.copied = copied_matrices(context.run.model, growths)
        self.last: dict[str, float] = {}
        """The last metrics and validation loss."""
        self.reported_underused: set[tuple[int, int]] = set()
        """The underused experts (layer, expert) that the terminal was told of."""
        self.bar = tqdm(
            total=phase.steps, initial=self.step, leave=False, dynamic_ncols=True, disable=None
        )
        if not self.bar.disable:
            self.bar.bar_format = bar_format(phase, self.bar.ncols or LINE_WIDTH)

    @property
    def where(self) -> str:
        """The phase and step, as error messages name them."""
        return f"{self.phase}, step {self.step}"

    def advance(self, progress: TrainingProgress, lr: float, metrics: Tensor) -> TrainingProgress:
        """Counts one more step, its learning rate and its STEP_METRICS, without waiting for the
        device. Returns the progress after it."""
        self.metrics.add(metrics)
        self.step, self.lr = self.step + 1, lr
        return progress._replace(
            step=self.step,
            metrics=self.metrics.state(),
            history_bytes=self.context.history.size(),
            tokens=self.phase.tokens_at(self.step),
            lr=lr,
        )

    def report(self, optimizer: Optimizer) -> None:
        """Logs and evaluates what is due after this step."""
        self.bar.update(self.step - self.bar.n)
        context, is_end = self.context, self.step == self.phase.steps
        training = context.run.training
        if self.metrics.steps and (step_s := self.timer.count()):
            # The first steps of a phase are slow: on a CPU kernels are made for their shapes.
            is_first = not any(phase.steps for phase in self.forecast.past(self.phase))
            self.tell_time_left(self.seconds_left(step_s if is_first else None))
            context.kernels.may_go_on.set()
        if self.metrics.steps and (self.step % training.log_every == 0 or is_end):
            measured = self.metrics.read(self.where)
            with self.metrics.paused(), self.counting("reports"):
                self.log(measured)
        if self.step % training.eval_every == 0 or is_end or self.is_settling:
            with self.metrics.paused():
                with self.counting("evaluation"):
                    self.evaluate(optimizer)
                with self.counting("reports"):
                    context.live_plot.update()

    def tell_time_left(self, left: list[ByKind]) -> None:
        """Says on the terminal how long the rest of the run takes, and the first time what its
        evaluations take."""
        context, phases = self.context, self.context.phases[-len(left) :]
        tqdm.write(wrap_lines(estimate_line(phases, left)))
        if not context.has_told_evaluations and (line := evaluation_share_line(phases, left)):
            tqdm.write(wrap_lines(line))
        context.has_told_evaluations = True

    def log(self, measured: dict[str, float]) -> None:
        """Writes a `step` line of what was measured since the last one."""
        low, high = self.lr_scale_range
        self.record("step", lr=self.lr, lr_min=low * self.lr, lr_max=high * self.lr, **measured)
        self.last |= measured
        if self.bar.disable:
            return
        speed = measured["tokens_per_s"]
        left = self.seconds_left(self.phase.tokens_per_step / speed)[0]
        time_left = tqdm.format_interval(sum(left.values()))
        self.bar.set_postfix_str(
            f"loss {measured['loss']:.3f}, {format_speed(speed)}, {time_left} left"
        )

    def seconds_left(self, step_s: float | None) -> list[ByKind]:
        """Returns the seconds to come, by kind, of this phase and of those after it, a step of this
        one taking `step_s`, or as long as in the phases before if None."""
        so_far = self.context.stopwatch.seconds()
        return self.forecast.seconds_left(self.phase, self.step, step_s, so_far)

    @property
    def is_settling(self) -> bool:
        """Whether the loss is to be taken now, to tell what the phase's growth did to it."""
        return self.phase.growth is not None and self.step in SETTLING_STEPS

    def evaluate(self, optimizer: Optimizer) -> None:
        """Writes an `eval` line, and says on the terminal how the phase goes."""
        context, phase = self.context, self.phase
        valid, batch_size = context.valid, context.eval_batch_size
        loss, values = evaluate(optimizer.model, valid.regular, context.dtype, batch_size)
        values["bits_per_byte"] = valid.bits_per_byte(loss)
        if self.step == phase.steps:
            final_loss = self.evaluate_further(optimizer, loss)
            values["final_valid_loss"] = final_loss
            values["final_bits_per_byte"] = valid.final_bits_per_byte(final_loss)
        self.last["valid_loss"] = values.get("final_valid_loss", loss)
        check_finite({"valid_loss": self.last["valid_loss"]}, self.where)
        weights = optimizer.weights()
        has_just_grown = phase.growth is not None and self.step == 0
        if has_just_grown and context.dtype == torch.float32:
            values["valid_loss_fp32"] = loss
        elif has_just_grown:
            model = layerwise_model(phase.config, weights)
            values["valid_loss_fp32"] = evaluate_fp32(model, valid.regular, batch_size)
        event = {"event": "eval", "phase": phase.number, "valid_loss": loss}
        self.events.append(event | values)
        for evaluated, above in loss_above_growth(self.events, phase.number)[-1:]:
            if evaluated is self.events[-1]:
                values["above_growth"] = above
        values |= weight_stats(self.copied, weights)
        self.record("eval", valid_loss=loss, **values)
        tqdm.write(progress_line(phase, self.step, self.last, values.get("above_growth")))
        self.report_underused(underused_experts(values.get("expert_load", [])))

    def report_underused(self, underused: list[tuple[int, int]]) -> None:
        """Says on the terminal which experts are underused, if some are that were not before. The
        router of a phase that only begins has had no time to learn."""
        if self.step == 0 or set(underused) <= self.reported_underused:
            return
        self.reported_underused.update(underused)
        coef = self.context.run.training.load_balance_coef
        tqdm.write(wrap_lines(underused_line(self.phase, underused, coef)))

    def evaluate_further(self, optimizer: Optimizer, loss: float) -> float:
        """Returns the validation loss on all windows of a phase's end, given that on the regular
        ones."""
        context, valid = self.context, self.context.valid
        if not len(valid.further):
            return loss
        batch_size = context.eval_batch_size
        further, _ = evaluate(optimizer.model, valid.further, context.dtype, batch_size)
        weight = valid.tokens / valid.final_tokens
        return weight * loss + (1 - weight) * further

    def record(self, event: str, **values: object) -> None:
        """Writes a line about this step into the history."""
        tokens = self.phase.tokens_at(self.step)
        self.context.record(self.phase, event, step=self.step, tokens=tokens, **values)
