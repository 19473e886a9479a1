"""What a phase says of itself while it trains: lines in the history, evaluations, a progress
bar."""

import torch
from torch import Tensor
from tqdm import tqdm

from models.layerwise import layerwise_model
from utils.checkpoint.resume import TrainingProgress
from utils.metrics.console import bar_format, format_speed, progress_line, underused_line
from utils.metrics.diagnostics import copied_matrices, underused_experts, weight_stats
from utils.metrics.history import loss_above_growth, phase_events, read_history
from utils.metrics.throughput import EtaEstimator, MetricAccumulator, check_finite
from utils.optim.adamw import Optimizer, lr_scale_range
from utils.runtime.formatting import LINE_WIDTH, wrap_lines
from utils.schedule.phases import ResolvedPhase
from utils.training.context import RunContext
from utils.training.evaluate import evaluate, evaluate_fp32

SETTLING_STEPS = (0, 10, 50, 200)
"""Steps after a growth at which the loss is also taken in float32."""


class PhaseReporter:
    """Reports on the phase that goes on from `progress`."""

    def __init__(self, phase: ResolvedPhase, context: RunContext, progress: TrainingProgress):
        self.phase, self.context, self.step, self.lr = phase, context, progress.step, progress.lr
        self.metrics = MetricAccumulator(context.device, phase.tokens_per_step, progress.metrics)
        is_first = (phase.number, self.step) == (1, 0)
        self.eta = EtaEstimator(context.phases, context.device) if is_first else None
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
        training, is_end = self.context.run.training, self.step == self.phase.steps
        if self.eta and (line := self.eta.line_after(self.step)):
            tqdm.write(wrap_lines(line))
        if self.metrics.steps and (self.step % training.log_every == 0 or is_end):
            measured = self.metrics.read(self.where)
            with self.metrics.paused():
                self.log(measured)
        if self.step % training.eval_every == 0 or is_end or self.is_settling:
            with self.metrics.paused():
                self.evaluate(optimizer)
                self.context.live_plot.update()

    def log(self, measured: dict[str, float]) -> None:
        """Writes a `step` line of what was measured since the last one."""
        low, high = self.lr_scale_range
        self.record("step", lr=self.lr, lr_min=low * self.lr, lr_max=high * self.lr, **measured)
        self.last |= measured
        speed = format_speed(measured["tokens_per_s"])
        self.bar.set_postfix_str(f"loss {measured['loss']:.3f}, {speed}")

    @property
    def is_settling(self) -> bool:
        """Whether the loss after the phase's growth is to be taken in float32 now."""
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
        if self.is_settling and context.dtype == torch.float32:
            values["valid_loss_fp32"] = loss
        elif self.is_settling:
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
