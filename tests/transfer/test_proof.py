"""The proof notices what breaks a law of growth."""

import pytest

from models import axes
from transfer import proof
from transfer.plan import Tile

MOE_CASES = [case for case in proof.CASES if case[1].num_experts]


@pytest.fixture
def moe_cases(monkeypatch):
    """Only the cases that start from experts."""
    assert len(MOE_CASES) == 3
    monkeypatch.setattr(proof, "CASES", MOE_CASES)


def test_growing_experts_that_differ_keeps_the_laws(moe_cases, capsys):
    assert proof.prove_growths()
    assert capsys.readouterr().out.count("held") == 2 * len(MOE_CASES)


def test_a_router_that_adds_up_its_copied_inputs_is_noticed(moe_cases, monkeypatch, capsys):
    """As the weights are then off no plan, only the function can tell."""

    def wrong_axes(name):
        return (("expert", "embed"), None) if "router" in name else axes(name)

    monkeypatch.setattr("transfer.plan.axes", wrong_axes)
    assert not proof.prove_growths()
    assert capsys.readouterr().out.count("BROKEN") == 2 * len(MOE_CASES)


@pytest.mark.parametrize("matrix", ["0.moe.router.weight", "0.attn.q_proj.weight"])
def test_noise_that_is_missing_on_one_matrix_is_noticed(moe_cases, monkeypatch, capsys, matrix):
    grow_weight = Tile.grow_weight

    def without_noise(row, old, generator):
        row = row._replace(noise=0.0) if row.source.endswith(matrix) else row
        return grow_weight(row, old, generator)

    monkeypatch.setattr(Tile, "grow_weight", without_noise)
    assert not proof.prove_growths()
    assert capsys.readouterr().out.count("a matrix's noise is off") == 2 * len(MOE_CASES)
