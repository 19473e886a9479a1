"""The proof of growth's mechanics: laws that hold for small random models, and for two checkpoints.

Small models grow by every operator and by chains of them, in float64 and float32, and some of them
are trained before and after: growing and training commute, unless a rule is broken.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from config import (
    Deepen,
    Growth,
    ModelConfig,
    Tolerance,
    Upcycle,
    Widen,
    require,
)
from models import SLM
from transfer.checks import (
    GrowthError,
    PlanChecker,
    broken_limits,
    compare_twice,
    grow,
    match_plan_blocks,
    plan_roundings,
    resolve_tolerance,
    rounding_drift,
    run_twice,
)
from transfer.growth import make_plan
from transfer.plan import Tile, TrainState, apply_plan
from utils.checkpoint.model import load_checkpoint
from utils.optim.commutation import MAX_GAP, STEPS_AFTER, CommutationTest, mutations
from utils.runtime.device import dtype_name
from utils.runtime.formatting import wrap_lines

DENSE = ModelConfig(vocab_size=101, d_model=32, n_layers=3, n_heads=4, d_ff=48, seq_len=32)
GROUPED_QUERY = replace(DENSE, n_kv_heads=2, tie_embeddings=False, position_embedding="learned")
SMALL_DENSE = replace(DENSE, n_layers=1, seq_len=8)
"""A model that is trained for a few hundred steps."""
SMALL_MOE = replace(SMALL_DENSE, num_experts=4)
MOE = replace(DENSE, num_experts=4)
"""Experts that differ, as trained ones do: where all are alike no routing is wrong."""
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
    ("deepen, upcycle, 2 x widen", DENSE, [Deepen(1), Upcycle(4), Widen(), Widen()]),
    ("grouped, learned, untied", GROUPED_QUERY, [Upcycle(4), Widen(), Deepen(3)]),
    ("MoE: widen x2, deepen", MOE, [Widen(), Deepen(2)]),
    ("MoE: deepen, widen x3", MOE, [Deepen(1), Widen(3)]),
    ("MoE, grouped: 2 x widen", replace(GROUPED_QUERY, num_experts=4), [Widen(), Widen()]),
]
COMMUTING: list[tuple[str, ModelConfig, Growth]] = [
    ("dense, widen x2", SMALL_DENSE, Widen(2, noise=0.0)),
    ("dense, widen x3", SMALL_DENSE, Widen(3, noise=0.0)),
    ("dense, deepen, new blocks frozen", SMALL_DENSE, Deepen(2)),
    ("4 experts, widen x2", SMALL_MOE, Widen(2, noise=0.0)),
    ("4 experts, widen x3", SMALL_MOE, Widen(3, noise=0.0)),
    ("4 experts, deepen, new blocks frozen", SMALL_MOE, Deepen(2, "middle")),
]
MUTATED = ("dense, widen x2", "dense, deepen, new blocks frozen", "4 experts, widen x2")
"""Cases in which each rule is also broken, to see that the test notices."""
MAX_ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5}
COLUMNS = ("logits", "loss", "weights", "gradients", "moments", "copies")
GROWTH_ROW = "{:<26}{:>7}{:>6}{:>8}{:>10}{:>8}{:>7}  {}"
COMMUTATION_ROW = "{:<44}{:>11}{:>11}  {}"


def random_state(config: ModelConfig, dtype: torch.dtype) -> TrainState:
    """Returns random weights, none of them 0 or 1, which would hide a wrong row of a plan."""
    torch.manual_seed(0)
    state = TrainState.from_model(SLM(config))
    for name, weight in state.weights.items():
        state.weights[name] = (weight + 0.1 * torch.randn_like(weight)).to(dtype)
    return state


def loss_gradients(state: TrainState, tokens: Tensor) -> dict[str, Tensor]:
    """Returns the gradient of the next-token loss for each parameter that has one."""
    model = state.model()
    logits = model(tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(
    old: TrainState, old_grads: dict[str, Tensor], new: TrainState, growth: Growth, tokens: Tensor
) -> float:
    """Returns how far the chain rule is off: the gradients of the copies, times their scale, must
    add up to the old gradient."""
    after = loss_gradients(new, tokens)
    errors = [
        (row.fold_copies(after[name]).sum(0) * row.scale - old_grads[row.source]).abs().max()
        for name, row in make_plan(old.config, growth)[1].items()
        if isinstance(row, Tile)
    ]
    return torch.stack(errors).max().item()


def moment_error(
    old: TrainState, old_grads: dict[str, Tensor], growth: Growth, tokens: Tensor
) -> float:
    """Returns how far Adam's grown moments are from those that the grown model's own gradient would
    have left. Noise and routing set the copies' gradients apart, so this is measured on copies that
    are alike."""
    if isinstance(growth, Upcycle):
        growth = replace(growth, top_k=growth.num_experts)
    if isinstance(growth, Widen):
        growth = replace(growth, noise=0.0)
    one = torch.ones(())
    adam = {
        name: {"step": one, "exp_avg": grad, "exp_avg_sq": grad**2}
        for name, grad in old_grads.items()
    }
    config, plan = make_plan(old.config, growth)
    new = apply_plan(config, plan, replace(old, adam=adam))
    if isinstance(growth, Upcycle):  # equal weights: every expert sees every token alike
        new.weights |= {n: torch.zeros_like(w) for n, w in new.weights.items() if "router" in n}
    after = loss_gradients(new, tokens)
    errors = [
        (moment - after[name] ** power).abs().max()
        for name, moments in new.adam.items()
        for moment, power in ((moments["exp_avg"], 1), (moments["exp_avg_sq"], 2))
    ]
    return torch.stack(errors).max().item()


def prove_chain(config: ModelConfig, chain: list[Growth], dtype: torch.dtype) -> list[str]:
    """Returns the cells of a row: the worst of each column along a chain of growths.

    Raises:
        GrowthError: if a law breaks.
    """
    limit = MAX_ERRORS[dtype]
    state = random_state(config, dtype)
    tokens = torch.randint(config.vocab_size, (4, config.seq_len + 1))
    steps = []
    for growth in chain:
        growth = replace(growth, tolerance=Tolerance(limit, limit))
        new, drift = grow(state, growth, tokens)
        old_grads = loss_gradients(state, tokens)
        measured = {
            "logits": drift.max_logit_diff,
            "loss": abs(drift.loss_drift),
            "weights": drift.plan_error,
            "gradients": gradient_error(state, old_grads, new, growth, tokens),
            "moments": moment_error(state, old_grads, growth, tokens),
            "copies": drift.copy_distance or 0.0,
        }
        for law in ("gradients", "moments"):
            if not measured[law] <= limit:
                error = f"{law} off by {measured[law]:.3g} (allowed: {limit:g})"
                raise GrowthError(f"{growth}: {error}", drift)
        steps.append(measured)
        state = new
    return [f"{max(step[law] for step in steps):.0e}" for law in COLUMNS]


def prove_growths() -> bool:
    """Prints a row for each chain in each dtype. Returns whether every law held."""
    all_held = True
    for dtype in MAX_ERRORS:
        print(GROWTH_ROW.format(f"growth, in {dtype_name(dtype)}", *COLUMNS, "").rstrip())
        for name, config, chain in CASES:
            try:
                print(GROWTH_ROW.format(name, *prove_chain(config, chain, dtype), "held"))
            except GrowthError as error:
                all_held = False
                print(GROWTH_ROW.format(name, *["-"] * len(COLUMNS), "BROKEN"))
                print(wrap_lines(f"    {error}"))
        print()
    return all_held


def prove_commutation() -> bool:
    """Prints how far growing then training is from training then growing, and what each broken rule
    does to it. Returns whether every rule held and every broken one was caught."""
    print(f"growing and {STEPS_AFTER} steps of Adam, in either order, and what broken rules do:")
    print(COMMUTATION_ROW.format("growth, in float64", "logits", "loss", "").rstrip())
    all_held = True
    for name, config, growth in COMMUTING:
        test = CommutationTest(config, growth)
        cases = {name: None} | (mutations(growth) if name in MUTATED else {})
        for case, mutation in cases.items():
            logits, loss = test.gap(mutation)
            is_right = (logits > MAX_GAP) == (mutation is not None)
            all_held &= is_right
            verdicts = ("BROKEN", "held") if mutation is None else ("MISSED", "caught")
            label = case if mutation is None else f"    {case}"
            cells = f"{logits:.1e}", f"{loss:.1e}"
            print(COMMUTATION_ROW.format(label, *cells, verdicts[is_right]))
    return all_held


def compare_checkpoints(before: Path, after: Path, unchecked: bool = False) -> bool:
    """Prints how far the second model's function is from the first's. Returns whether it is the
    same.

    Raises:
        InputError: if the second did not grow out of the first, or the first holds no probe.
    """
    old, new = (load_checkpoint(path, unchecked) for path in (before, after))
    growths = new.growth_history[len(old.growth_history) :]
    shared = new.growth_history[: len(old.growth_history)]
    require(shared == old.growth_history, f"{after} did not grow out of {before}")
    require(old.probe is not None, f"{before} holds no probe batch")
    assert old.probe is not None
    config, layers = old.config, list[int | None](range(old.config.n_layers))
    checker, roundings = PlanChecker(), 0.0
    for growth in growths:
        config, plan = make_plan(config, growth)
        roundings += plan_roundings(plan)
        layers = [None if i is None else layers[i] for i in match_plan_blocks(plan)]
        if len(growths) == 1:
            for name, row in plan.items():
                source = old.weights[row.source] if isinstance(row, Tile) else None
                checker(name, row, source, new.weights[name])
    is_exact = all(growth.is_exact for growth in growths)
    model = old.state.model()
    outputs = run_twice(model, old.probe)
    drift = compare_twice(outputs, run_twice(new.state.model(), old.probe), layers, is_exact)
    if len(growths) == 1:
        drift = replace(drift, **checker.summary())
    by_rounding = rounding_drift(model, old.probe, outputs[0], roundings)
    # Each growth may move the loss by its own limit, and a logit by the largest of their limits.
    limits = [resolve_tolerance(growth, by_rounding.logit) for growth in growths or [Deepen(0)]]
    logit_limit = max(logit for logit, _ in limits)
    drift = replace(drift, logit_limit=logit_limit, margin_limit=by_rounding.margin)
    print(wrap_lines(f"on the probe, a batch of validation text that {before} holds:"))
    for name, value in asdict(drift).items():
        if value is not None:
            print(f"{name:<20}{value:.6g}")
    broken = broken_limits(drift, sum(loss for _, loss in limits), is_exact)
    for phrase in broken:
        print(wrap_lines(phrase))
    return not broken


def prove(before: Path | None, after: Path | None, unchecked: bool) -> bool:
    """Prints whether two checkpoints are the same function or, without them, whether each law of
    growth holds. Returns whether it does.

    Raises:
        InputError: for one checkpoint without the other, and where they cannot be compared.
    """
    require((before is None) == (after is None), "--before and --after belong together")
    torch.set_num_threads(1)  # a second thread slows models as small as these down
    if before is not None and after is not None:
        all_held = compare_checkpoints(before, after, unchecked)
    else:
        all_held = prove_growths() & prove_commutation()
    print("every law holds" if all_held else "NOT every law holds")
    return all_held
