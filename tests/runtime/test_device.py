"""The device and the precision of a run, and what is said of its memory."""

import os

import pytest
import torch

from config import InputError
from utils.runtime.device import (
    choose_device,
    is_out_of_memory,
    on_cpu,
    shrink_cublas_workspaces,
    training_dtype,
)


def test_auto_is_the_best_device_of_this_machine():
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    assert choose_device("auto").type == ("cuda" if cuda else "mps" if mps else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps:7", "meta", "", "cpu:", "cuda:x", "CPU"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(InputError, match=rf"^device = {name} is not there; .* has .*cpu$"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused():
    with pytest.raises(InputError, match="device = cuda is not there"):
        choose_device("cuda")


def test_auto_precision_is_bf16_on_cuda_and_not_on_mps():
    for kind in ("mps", "cuda"):
        device = torch.device(kind)
        assert training_dtype("fp32", device) == torch.float32
        assert training_dtype("bf16", device) == torch.bfloat16
        assert (training_dtype("auto", device) == torch.bfloat16) == (kind == "cuda")


def test_small_workspaces_leave_what_was_set_by_hand(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "restored after the test")
    monkeypatch.delenv("CUBLASLT_WORKSPACE_SIZE")
    shrink_cublas_workspaces()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLASLT_WORKSPACE_SIZE"] == "8192"


def test_tensors_that_lie_on_the_cpu_are_handed_on_and_not_copied():
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert all(on_cpu(tensors)[name] is tensor for name, tensor in tensors.items())


def test_a_cpu_that_runs_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
