from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models import SLM
from tests.helpers.small_models import DENSE, MOE, for_each_config, random_model, windows
from transfer.checks import probe_expert_load
from transfer.probe import run_probe


def all_logits(output):
    return torch.cat(list(output.logits()))


@for_each_config
@pytest.mark.parametrize("tokens_at_a_time", [1, 5, 2048])
def test_the_output_is_that_of_the_model_on_the_whole_probe_at_once(
    config, tokens_at_a_time, monkeypatch
):
    monkeypatch.setattr("transfer.probe.FORWARD_TOKENS", tokens_at_a_time)
    monkeypatch.setattr("transfer.probe.LOGIT_TOKENS", tokens_at_a_time)
    model, probe = random_model(config), windows(config)
    out, output = model(probe[:, :-1]), run_probe(model, probe)
    torch.testing.assert_close(all_logits(output), out.logits.flatten(0, 1))
    targets = probe[:, 1:].flatten()
    loss_N = F.cross_entropy(out.logits.flatten(0, 1), targets, reduction="none")
    torch.testing.assert_close(output.loss_BT.flatten(), loss_N)
    assert output.largest_logit() == pytest.approx(out.logits.abs().max().item())
    assert output.expert_ids_BLTC.shape == (3, len(out.routing), 13, 2 if out.routing else 0)
    for layer, routing in enumerate(out.routing):
        expert_ids_NC = output.expert_ids_BLTC[:, layer].flatten(0, 1)
        assert torch.equal(expert_ids_NC, routing.expert_ids_NC.sort(-1).values)
        ranked_NE = routing.logits_NE.sort(-1, descending=True).values
        margin_N = output.margin_BLT[:, layer].flatten()
        torch.testing.assert_close(margin_N, ranked_NE[:, 1] - ranked_NE[:, 2])
    if out.routing:
        load_LE = probe_expert_load(output, config.num_experts)
        torch.testing.assert_close(load_LE, torch.stack([layer.load_E for layer in out.routing]))
        torch.testing.assert_close(load_LE.sum(1), torch.ones(len(load_LE), dtype=torch.double))


def test_where_every_expert_is_chosen_no_other_could_be():
    config = replace(MOE, top_k=MOE.num_experts)
    assert run_probe(random_model(config), windows(config)).margin_BLT.isinf().all()


def test_the_output_does_not_depend_on_autocast_or_the_matmul_precision():
    torch.manual_seed(0)
    model, probe = SLM(DENSE), windows(DENSE)
    expected, precisions = run_probe(model, probe), set()
    get_precision = torch.get_float32_matmul_precision
    model.embed.register_forward_hook(lambda *_: precisions.add(get_precision()))
    original = get_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            output = run_probe(model, probe)
        assert precisions == {"highest"}
        assert get_precision() == "medium"
        with pytest.raises(ValueError, match="context"):
            run_probe(model, torch.zeros(1, 99, dtype=torch.long))
        assert get_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(original)
    pairs = list(zip(output, expected, strict=True))
    assert len(pairs) == 5 and all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_are_judged_in_float64_and_stay_as_they_were(dtype):
    model, probe = random_model(MOE).to(dtype), windows(MOE)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    output = run_probe(model, probe)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    torch.testing.assert_close(all_logits(output), all_logits(run_probe(model.double(), probe)))
    assert output.loss_BT.dtype == torch.float64


def test_a_rounding_moves_every_weight_a_little_and_leaves_the_model_alone():
    model, probe = random_model(DENSE), windows(DENSE)
    exact, rounded = (run_probe(model, probe, rounding=size) for size in (0.0, 1e-9))
    moved = (all_logits(rounded) - all_logits(exact)).abs().max().item()
    assert 1e-11 < moved / exact.largest_logit() < 1e-7
    assert torch.equal(all_logits(run_probe(model, probe)), all_logits(exact))
