"""What a phase says of itself while it trains: lines in the history, evaluations, a bar."""

import torch
from torch import Tensor
from tqdm import tqdm

from models import SLM, next_token_loss
from utils.device import autocast
from utils.header import progress
from utils.history import read, select
from utils.lab import Lab
from utils.meter import Forecast, Meter, check_finite
from utils.resume import Place
from utils.schedule import Stage, lr_at

EVAL_SEQUENCES = 8


class Reporter:
    """Reports on the phase that goes on at `place`."""

    def __init__(self, stage: Stage, lab: Lab, place: Place):
        self.stage, self.lab, self.step = stage, lab, place.step
        self.meter = Meter(lab.device, stage.tokens_per_step, place.reading)
        self.forecast = (
            Forecast(lab.stages, lab.device) if (stage.number, self.step) == (1, 0) else None
        )
        self.at_growth = loss_at_growth(stage, lab) if self.step else None
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

    def report(self, model: SLM) -> None:
        """Logs and evaluates what is due after this step."""
        self.bar.update(self.step - self.bar.n)
        settings, at_end = self.lab.run.training, self.step == self.stage.phase.steps
        if self.forecast and (line := self.forecast.after(self.step)):
            tqdm.write(line)
        if self.meter.steps and (self.step % settings.log_every == 0 or at_end):
            self.log()
        if self.step % settings.eval_every == 0 or at_end:
            with self.meter.paused():
                self.evaluate(model)
                self.lab.sketch.update()

    def log(self) -> None:
        measured = self.meter.read(self.where)
        lr = lr_at(self.step - 1, self.stage.phase, self.lab.run.training)
        self.note("step", lr=lr, **measured)
        self.last |= measured
        self.bar.set_postfix(loss=measured["loss"], tokens_per_s=measured["tokens_per_s"])

    def evaluate(self, model: SLM) -> None:
        loss, load = evaluate(model, self.lab)
        check_finite({"valid_loss": loss}, self.where)
        self.last["valid_loss"] = loss
        if self.stage.phase.grow is not None:
            self.at_growth = loss if self.at_growth is None else self.at_growth
            load["above_growth"] = loss - self.at_growth
        self.note("eval", valid_loss=loss, **load)
        tqdm.write(progress(self.stage, self.step, self.last, load.get("above_growth")))

    def note(self, event: str, **values: object) -> None:
        tokens = self.stage.tokens_at(self.step)
        self.lab.note(self.stage, event, step=self.step, tokens=tokens, **values)


def loss_at_growth(stage: Stage, lab: Lab) -> float | None:
    """What a phase that is gone on with evaluated to before its first step."""
    for event in select(read(lab.history.path), "eval"):
        if (event["phase"], event["step"]) == (stage.number, 0):
            return event["valid_loss"]
    return None


@torch.no_grad()
def evaluate(model: SLM, lab: Lab) -> tuple[float, dict]:
    """Loss on the held-out windows, and the share of choices that each layer's experts got."""
    loss = torch.zeros((), device=lab.device)
    loads = []
    for rows in lab.valid.split(EVAL_SEQUENCES):
        share = len(rows) / len(lab.valid)
        with autocast(lab.device, lab.dtype):
            out = model(rows[:, :-1])
            loss += share * next_token_loss(out, rows)
        if out.routing:
            loads.append(share * torch.stack([layer.load_E for layer in out.routing]))
    return loss.item(), {"expert_load": torch.stack(loads).sum(0).tolist()} if loads else {}
