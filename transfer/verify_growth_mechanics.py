"""Proves the mechanics of growth: prints a table, and exits with 0 only if every law holds.

python transfer/verify_growth_mechanics.py
    grows small random models by every operator and by chains of them, in float64 and float32, and
    trains some of them before and after: growing and training commute, unless a rule is broken
python transfer/verify_growth_mechanics.py --before A.pt --after B.pt
    compares two checkpoints on the probe batch stored in the first
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":  # run from anywhere, and transfer.py here must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Deepen, Growth, InputError, ModelConfig, Upcycle, Widen, require
from models import SLM
from transfer.drift import GrowthError, Structure, block_map, broken_laws, compare, grow
from transfer.growth import plan_for
from transfer.plan import State, Tile, carry_out
from transfer.view import look

DENSE = ModelConfig(vocab_size=101, d_model=32, n_layers=3, n_heads=4, d_ff=48, seq_len=32)
GROUPED = replace(DENSE, n_kv_heads=2, tied=False, position="learned")
BRIEF = replace(DENSE, n_layers=1, seq_len=8)
"""Trained a few hundred steps."""
MOE = replace(BRIEF, num_experts=4)
CASES: list[tuple[str, ModelConfig, list[Growth]]] = [
    ("upcycle", DENSE, [Upcycle(4)]),
    ("widen x2", DENSE, [Widen()]),
    ("widen x3, noise 1", DENSE, [Widen(3, noise=1.0)]),
    ("widen x2, no noise", DENSE, [Widen(noise=0.0)]),
    ("deepen", DENSE, [Deepen(2)]),
    ("deepen at the end", DENSE, [Deepen(4, "end")]),
    ("deepen in the middle", DENSE, [Deepen(2, "middle")]),
    ("upcycle, widen, deepen", DENSE, [Upcycle(8), Widen(), Deepen(3)]),
    ("widen x3, upcycle, deepen", DENSE, [Widen(3), Upcycle(4), Deepen(2)]),
    ("deepen, upcycle, widen, widen", DENSE, [Deepen(1), Upcycle(4), Widen(), Widen()]),
    ("grouped, learned, untied", GROUPED, [Upcycle(4), Widen(), Deepen(3)]),
]
SQUARES: list[tuple[str, ModelConfig, Growth]] = [
    ("dense, widen x2", BRIEF, Widen(2, noise=0.0)),
    ("dense, widen x3", BRIEF, Widen(3, noise=0.0)),
    ("dense, deepen, new blocks frozen", BRIEF, Deepen(2)),
    ("4 experts, widen x2", MOE, Widen(2, noise=0.0)),
    ("4 experts, widen x3", MOE, Widen(3, noise=0.0)),
    ("4 experts, deepen, new blocks frozen", MOE, Deepen(2, "middle")),
]
BROKEN = ("dense, widen x2", "dense, deepen, new blocks frozen", "4 experts, widen x2")
"""Of these the rules are broken too."""
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4}
MEASURES = ("logits", "loss", "weights", "gradients", "moments", "twins")
ROW = "{:<44}{:<10}" + "{:>11}" * len(MEASURES) + "  {}"


def trained_like(config: ModelConfig, dtype: torch.dtype) -> State:
    """Random weights, none of them 0 or 1, which would hide a wrong row of a plan."""
    torch.manual_seed(0)
    state = State.of(SLM(config))
    for name, weight in state.weights.items():
        state.weights[name] = (weight + 0.1 * torch.randn_like(weight)).to(dtype)
    return state


def gradients(state: State, tokens: Tensor) -> dict[str, Tensor]:
    model = state.model()
    logits = model(tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(old: State, new: State, how: Growth, tokens: Tensor) -> float:
    """The chain rule: the gradients of the copies, times their scale, add up to the old one."""
    before, after = gradients(old, tokens), gradients(new, tokens)
    errors = [
        (row.copies_of(after[name]).sum(0) * row.scale - before[row.source]).abs().max()
        for name, row in plan_for(old.config, how)[1].items()
        if isinstance(row, Tile)
    ]
    return torch.stack(errors).max().item()


def moment_error(old: State, how: Growth, tokens: Tensor) -> float:
    """Adam's moments, grown, are those that the grown model's own gradient would have left. (Noise
    and routing set the copies' gradients apart, so it is held to copies that are alike.)"""
    if isinstance(how, Upcycle):
        how = replace(how, top_k=how.num_experts)
    if isinstance(how, Widen):
        how = replace(how, noise=0.0)
    one = torch.ones(())
    adam = {
        name: {"step": one, "exp_avg": g, "exp_avg_sq": g**2}
        for name, g in gradients(old, tokens).items()
    }
    config, plan = plan_for(old.config, how)
    new = carry_out(config, plan, replace(old, adam=adam))
    if isinstance(how, Upcycle):  # equal gates: every expert sees every token with the same weight
        new.weights |= {n: torch.zeros_like(w) for n, w in new.weights.items() if "router" in n}
    after = gradients(new, tokens)
    errors = [
        (moment - after[name] ** power).abs().max()
        for name, moments in new.adam.items()
        for moment, power in ((moments["exp_avg"], 1), (moments["exp_avg_sq"], 2))
    ]
    return torch.stack(errors).max().item()


def prove(config: ModelConfig, chain: list[Growth], dtype: torch.dtype) -> list[str]:
    """Cells of a row: the worst of each measure along a chain of growths. Raises GrowthError where
    a law breaks."""
    limit = LIMITS[dtype]
    state = trained_like(config, dtype)
    tokens = torch.randint(config.vocab_size, (4, config.seq_len + 1))
    steps = []
    for how in chain:
        how = replace(how, max_logit_drift=limit, max_loss_drift=limit)
        new, drift = grow(state, how, tokens)
        measured = {
            "logits": drift.max_logit_diff,
            "loss": abs(drift.loss_drift),
            "weights": drift.structure_error,
            "gradients": gradient_error(state, new, how, tokens),
            "moments": moment_error(state, how, tokens),
            "twins": drift.twin_distance or 0.0,
        }
        for law in ("gradients", "moments"):
            if not measured[law] <= limit:
                off = f"{law} off by {measured[law]:.3g} (allowed: {limit:g})"
                raise GrowthError(f"{how}: {off}", drift)
        steps.append(measured)
        state = new
    return [f"{max(step[law] for step in steps):.1e}" for law in MEASURES]


def prove_all() -> bool:
    """Prints the table; True if every law held."""
    print(ROW.format("growth", "in", *MEASURES, ""))
    return prove_growths() & prove_squares()


def prove_growths() -> bool:
    held = True
    for dtype in LIMITS:
        for name, config, chain in CASES:
            try:
                cells, said = prove(config, chain, dtype), "held"
            except GrowthError as error:
                held, cells, said = False, ["-"] * len(MEASURES), f"BROKEN: {error}"
            print(ROW.format(name, str(dtype).removeprefix("torch."), *cells, said))
    return held


def prove_squares() -> bool:
    """Growing, then training, against training, then growing; and what each broken rule does."""
    from utils.square import ALLOWED, STEPS, Square, breaches

    print(f"growing and {STEPS} steps of Adam, in either order, and what each broken rule does")
    held, untold = True, ["-"] * (len(MEASURES) - 2)
    for name, config, how in SQUARES:
        square = Square(config, how)
        cases = {name: None} | (breaches(how) if name in BROKEN else {})
        for case, breach in cases.items():
            logits, loss = square.gap(breach)
            right = (logits > ALLOWED) == (breach is not None)
            held &= right
            said = ("BROKEN", "held") if breach is None else ("MISSED", "caught")
            label = case if breach is None else f"    {case}"
            cells = [f"{logits:.1e}", f"{loss:.1e}", *untold]
            print(ROW.format(label, "float64", *cells, said[right]))
    return held


def compare_checkpoints(before: Path, after: Path) -> bool:
    """Prints how far the second model's function is from the first's; True if it is the same."""
    from utils.checkpoint import load

    old, new = load(before), load(after)
    grown = new.growth[len(old.growth) :]
    require(new.growth[: len(old.growth)] == old.growth, f"{after} did not grow out of {before}")
    require(old.probe is not None, f"{before} holds no probe batch")
    assert old.probe is not None
    config, layers = old.config, list[int | None](range(old.config.n_layers))
    structure = Structure()
    for how in grown:
        config, plan = plan_for(config, how)
        layers = [None if i is None else layers[i] for i in block_map(plan)]
        if len(grown) == 1:
            for name, row in plan.items():
                source = old.weights[row.source] if isinstance(row, Tile) else None
                structure(name, row, source, new.weights[name])
    exact = all(how.exact for how in grown)
    old_view, new_view = (look(model.state.model(), old.probe) for model in (old, new))
    drift = compare(old_view, new_view, layers, exact)
    if len(grown) == 1:
        drift = replace(drift, **structure.summary())
    for name, value in asdict(drift).items():
        if value is not None:
            print(f"{name:<18}{value:.6g}")
    loosest = max(grown, key=lambda how: how.limits.logit, default=Deepen())
    loss = sum(how.limits.loss for how in grown) or loosest.limits.loss  # each may move it
    broken = broken_laws(drift, replace(loosest, max_loss_drift=loss))
    print("\n".join(broken))
    return not broken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, metavar="A.pt")
    parser.add_argument("--after", type=Path, metavar="B.pt")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a second thread slows models as small as these down
    if (args.before is None) != (args.after is None):
        parser.error("--before and --after belong together")
    try:
        held = compare_checkpoints(args.before, args.after) if args.before else prove_all()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("every law holds" if held else "NOT every law holds")
    sys.exit(not held)


if __name__ == "__main__":
    main()
