"""The precision that a CPU trains in, and the memory that its steps use again."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from config import ModelConfig
from models import SLM, next_token_loss
from utils.runtime.cpu import return_freed_memory, reuse_memory_and_kernels
from utils.runtime.device import autocast, training_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"neon": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bf16_is_chosen_where_it_is_native_and_never_emulated(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert training_dtype("auto", CPU) == dtype
    assert training_dtype("fp32", CPU) == torch.float32
    assert training_dtype("bf16", CPU) == torch.bfloat16


def test_a_torch_that_names_no_capabilities_computes_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert training_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("experts", [0, 4])
def test_bf16_on_the_cpu_is_the_same_function_within_its_rounding(experts):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300, d_model=64, n_layers=2, n_heads=2, d_ff=96, seq_len=32, num_experts=experts
    )
    model, tokens = SLM(config), torch.randint(300, (4, 33))

    def loss_and_gradient(dtype):
        model.zero_grad()
        with autocast(CPU, dtype):
            loss = next_token_loss(model(tokens[:, :-1]), tokens)
        loss.backward()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact_loss, exact_gradient = loss_and_gradient(torch.float32)
    loss, gradient = loss_and_gradient(torch.bfloat16)
    assert gradient.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact_loss, atol=0, rtol=2e-3)
    assert (gradient - exact_gradient).norm() < 0.05 * exact_gradient.norm()


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_memory_is_left_alone_where_malloc_is_not_glibcs(monkeypatch, error):
    def load(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", load)
    reuse_memory_and_kernels()
    return_freed_memory()


@pytest.mark.parametrize(("by_hand", "capacity"), [(None, "2048"), ("1100", "1100")])
def test_room_for_more_kernels_is_asked_for_but_not_over_a_value_set_by_hand(
    monkeypatch, by_hand, capacity
):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, by_hand or "restored after the test")
    if by_hand is None:
        monkeypatch.delenv(name)
    reuse_memory_and_kernels()
    assert os.environ[name] == capacity


REUSE = """
import ctypes, resource, torch
from utils.runtime.cpu import reuse_memory_and_kernels
if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
    raise SystemExit("another libc")
reuse_memory_and_kernels()
def page_faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        buffers = [torch.ones(10 << 20) for _ in range(3)]  # 40 MB: glibc maps from 32 MB on
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
page_faults(10)
print(page_faults(10))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts Linux's page faults")
def test_with_glibc_freed_buffers_are_used_again():
    done = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, timeout=60)
    if "another libc" in done.stderr:
        pytest.skip("another libc")
    pages = 3 * 10 * (40 << 20) / 4096
    assert int(done.stdout) < pages / 10, done.stderr
