"""What a phase says of itself while it trains: lines in the history, evaluations, a bar."""

import torch
from torch import Tensor
from tqdm import tqdm

from models import SLM, next_token_loss
from transfer.view import exact_matmul
from utils.alive import ROUTING, routing_alive, starving, twin_rows, weights_alive
from utils.device import autocast
from utils.header import progress
from utils.history import above_growth, read
from utils.lab import Lab
from utils.meter import Forecast, Meter, check_finite
from utils.optimizer import Optimizer
from utils.resume import Place
from utils.schedule import Stage, lr_at
from utils.streamed import streamed

EVAL_SEQUENCES, LEAN_SEQUENCES = 8, 2
"""Evaluated at a time: a lean run must not need more for it than for a step of one sequence."""
SETTLING = (0, 10, 50, 200)
"""Steps after a growth at which the loss is also taken in float32."""


class Reporter:
    """Reports on the phase that goes on at `place`."""

    def __init__(self, stage: Stage, lab: Lab, place: Place):
        self.stage, self.lab, self.step = stage, lab, place.step
        self.meter = Meter(lab.device, stage.tokens_per_step, place.reading)
        self.forecast = (
            Forecast(lab.stages, lab.device) if (stage.number, self.step) == (1, 0) else None
        )
        self.past = [e for e in read(lab.history.path) if e.get("phase") == stage.number]
        self.twins = twin_rows(lab.run.model, stage.growth)
        self.last: dict[str, float] = {}
        self.bar = tqdm(
            total=stage.phase.steps, initial=self.step, desc=str(stage), unit="step", disable=None
        )

    @property
    def where(self) -> str:
        return f"{self.stage}, step {self.step}"

    def trained(self, measures: Tensor) -> None:
        """One more step is done. It does not wait for the device."""
        self.meter.add(measures)
        self.step += 1

    def place(self, place: Place) -> Place:
        """Where the run stands now, `place` being where it stood a step ago."""
        now = {
            "step": self.step,
            "reading": self.meter.reading(),
            "history": self.lab.history.size(),
        }
        return place._replace(**now)

    def report(self, optimizer: Optimizer) -> None:
        """Logs and evaluates what is due after this step."""
        self.bar.update(self.step - self.bar.n)
        settings, at_end = self.lab.run.training, self.step == self.stage.phase.steps
        if self.forecast and (line := self.forecast.after(self.step)):
            tqdm.write(line)
        if self.meter.steps and (self.step % settings.log_every == 0 or at_end):
            self.log()
        if self.step % settings.eval_every == 0 or at_end or self.settles:
            with self.meter.paused():
                self.evaluate(optimizer)
                self.lab.sketch.update()

    def log(self) -> None:
        measured = self.meter.read(self.where)
        lr = lr_at(self.step - 1, self.stage, self.lab.run.training)
        self.note("step", lr=lr, **measured)
        self.last |= measured
        self.bar.set_postfix(loss=measured["loss"], tokens_per_s=measured["tokens_per_s"])

    @property
    def settles(self) -> bool:
        return self.stage.phase.grow is not None and self.step in SETTLING

    def evaluate(self, optimizer: Optimizer) -> None:
        loss, found = evaluate(optimizer.model, self.lab, self.lab.dtype)
        check_finite({"valid_loss": loss}, self.where)
        self.last["valid_loss"] = loss
        weights = optimizer.weights()
        if self.settles:
            found["valid_loss_fp32"] = (
                loss
                if self.lab.dtype == torch.float32
                else loss_fp32(streamed(self.stage.config, weights), self.lab)
            )
        self.past.append({"event": "eval", "phase": self.stage.number, "valid_loss": loss} | found)
        if above := above_growth(self.past, self.stage.number):
            _, found["above_growth"] = above[-1]
        found |= weights_alive(self.twins, weights)
        self.note("eval", valid_loss=loss, **found)
        tqdm.write(progress(self.stage, self.step, self.last, found.get("above_growth")))
        if hungry := starving(found.get("expert_load", [])):
            tqdm.write(starvation(hungry))

    def note(self, event: str, **values: object) -> None:
        tokens = self.stage.tokens_at(self.step)
        self.lab.note(self.stage, event, step=self.step, tokens=tokens, **values)


@torch.no_grad()
def evaluate(model: SLM, lab: Lab, dtype: torch.dtype) -> tuple[float, dict]:
    """Loss on the held-out windows, products in `dtype`, and how the experts are used: the share of
    choices that each layer's experts got, the share of experts that dropped out, and ROUTING."""
    loss = torch.zeros((), device=lab.device)
    loads, routings = [], []
    at_once = LEAN_SEQUENCES if lab.run.training.lean else EVAL_SEQUENCES
    for rows in lab.valid.split(at_once):
        share = len(rows) / len(lab.valid)
        with autocast(lab.device, dtype):
            out = model(rows[:, :-1])
            loss += share * next_token_loss(out, rows)
        if out.routing:
            loads.append(share * torch.stack([layer.load_E for layer in out.routing]))
            routings.append(share * routing_alive(out.routing))
    if not loads:
        return loss.item(), {}
    load = torch.stack(loads).sum(0)
    routing = torch.stack(routings).sum(0).tolist()
    dropped = len(starving(load.tolist())) / load.numel()
    found = {"expert_load": load.tolist(), "dropped_experts": dropped}
    return loss.item(), found | dict(zip(ROUTING, routing, strict=True))


def loss_fp32(model: SLM, lab: Lab) -> float:
    """Loss on the held-out windows with autocast off, judged by which growth makes no jump."""
    with exact_matmul():
        return evaluate(model, lab, torch.float32)[0]


def starvation(hungry: list[tuple[int, int]]) -> str:
    named = ", ".join(f"{expert} of layer {layer}" for layer, expert in hungry[:4])
    more = f" and {len(hungry) - 4} more" if len(hungry) > 4 else ""
    return f"  STARVING, under a tenth of a fair share of the tokens: expert {named}{more}"
