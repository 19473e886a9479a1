import pytest
import torch

from models import SLM
from tests.helpers.small_models import DENSE, MOE, for_each_config, random_model, windows
from transfer.checks import probe_expert_load
from transfer.probe import run_probe


@for_each_config
def test_the_output_is_that_of_the_model_on_the_whole_probe_at_once(config):
    model, probe = random_model(config), windows(config)
    out, output = model(probe[:, :-1]), run_probe(model, probe)
    torch.testing.assert_close(output.logits_BTV, out.logits)
    assert output.expert_ids_BLTC.shape == (3, len(out.routing), 13, 2 if out.routing else 0)
    for layer, routing in enumerate(out.routing):
        expert_ids_NC = output.expert_ids_BLTC[:, layer].flatten(0, 1)
        assert torch.equal(expert_ids_NC, routing.expert_ids_NC.sort(-1).values)
    if out.routing:
        load_LE = probe_expert_load(output, config.num_experts)
        torch.testing.assert_close(load_LE, torch.stack([layer.load_E for layer in out.routing]))
        torch.testing.assert_close(load_LE.sum(1), torch.ones(len(load_LE), dtype=torch.double))


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
    assert all(torch.equal(one, other) for one, other in zip(output, expected, strict=True))


def test_weights_in_bf16_are_judged_in_float32_and_stay_as_they_were():
    model, probe = random_model(MOE).bfloat16(), windows(MOE)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    output = run_probe(model, probe)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    expected = run_probe(model.float(), probe)
    assert all(torch.equal(one, other) for one, other in zip(output, expected, strict=True))
