from dataclasses import replace

import pytest
import torch

from config import InputError, full
from utils.runtime.errors import RunStopped
from utils.schedule import memory
from utils.schedule.memory import (
    check_memory,
    explain_out_of_memory,
    memory_gb,
    phase_memory_gb,
)
from utils.schedule.phases import resolve_phases

BF16 = torch.bfloat16


def test_every_phase_of_the_full_preset_fits_a_card_of_22_gb():
    for phase in resolve_phases(full()):
        assert memory_gb(phase.config, phase.batch_size, BF16) < 22


def test_the_memory_expected_grows_with_the_sequences_at_a_time_and_with_their_precision():
    config = resolve_phases(full())[1].config
    few, many = (memory_gb(config, sequences, BF16) for sequences in (1, 8))
    assert 16 * config.num_params / 1e9 < few < many < memory_gb(config, 8, torch.float32)


def test_a_micro_batch_is_expected_to_need_what_a_batch_of_its_size_needs():
    def expected_gb(**changes):
        run = replace(full(), training=replace(full().training, **changes))
        return phase_memory_gb(resolve_phases(run)[0], run, torch.device("cpu"))

    assert expected_gb(micro_batch_size=2) == expected_gb(batch_size=2) < expected_gb()
    assert expected_gb(micro_batch_size=16) == expected_gb()


def test_gradients_that_add_up_in_float32_take_two_bytes_a_parameter_more():
    config = resolve_phases(full())[0].config
    whole, in_parts = (
        memory_gb(config, 1, BF16, is_fused=True, has_micro_batches=parts)
        for parts in (False, True)
    )
    assert in_parts - whole == pytest.approx(2 * config.num_params / 1e9)


@pytest.mark.parametrize("device, is_fused", [("cuda", True), ("cuda", False), ("cpu", False)])
def test_the_settings_offered_where_memory_is_short_make_every_phase_fit(
    device, is_fused, monkeypatch
):
    monkeypatch.setattr(memory, "fused_kernels_available", lambda *_: is_fused)
    batch_sizes = dict.fromkeys(("batch_size", "batch_size_phase3", "batch_size_phase4"), 64)
    run = replace(full(), training=replace(full().training, **batch_sizes), precision="bf16")
    device, offers = torch.device(device), set()
    for free_gb in range(1, 60):
        monkeypatch.setattr(memory, "free_memory_gb", lambda _, free_gb=free_gb: free_gb)
        try:
            check_memory(resolve_phases(run), run, device)
        except InputError as error:
            message = str(error)
            assert message.startswith("phase 4 (deep) needs about ")
            offer = {
                "low_memory": "--training.low-memory" in message,
                "micro_batch_size": 1 if "--training.micro-batch-size 1" in message else None,
            }
            offers.add(tuple(offer.values()))
            changed = replace(run, training=replace(run.training, **offer))
            if any(offer.values()):
                check_memory(resolve_phases(changed), changed, device)
            else:
                assert "only a smaller model would fit" in message
    assert offers == {(False, None), (False, 1)} | ({(True, 1)} if is_fused else set())


def test_memory_that_runs_out_stops_the_run_and_names_the_setting_that_needs_less():
    phase = resolve_phases(full())[0]
    message = r"^phase 1 \(dense\): out of memory with 2 of its batch of 8 .*micro-batch-size"
    with pytest.raises(RunStopped, match=message), explain_out_of_memory(phase, 2):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match=r"^another"), explain_out_of_memory(phase, None):
        raise RuntimeError("another error")
