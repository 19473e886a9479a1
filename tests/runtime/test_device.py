"""The device and the precision of a run, and what is said of its memory."""

import os

import pytest
import torch

from config import InputError
from utils.runtime.device import (
    MIN_PINNED_BYTES,
    PINNED_BYTES,
    choose_device,
    is_out_of_memory,
    on_cpu,
    shrink_cublas_workspaces,
    to_cpu,
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


ODD = PINNED_BYTES // 4 + 3
"""Float32 numbers that are no whole number of chunks."""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (), (0,), (1,), (3, 5), (MIN_PINNED_BYTES // 4 - 1,), (MIN_PINNED_BYTES // 4,),
        (MIN_PINNED_BYTES + 1,), (PINNED_BYTES // 4,), (PINNED_BYTES // 2,), (ODD,), (7, ODD),
        (2 * PINNED_BYTES // 4, 4),
    ],
)  # fmt: skip
def test_what_comes_from_a_gpu_has_the_same_bits_whatever_its_size(shape, dtype):
    torch.manual_seed(0)
    on_gpu = torch.randint(256, shape, device="cuda").to(dtype)
    copy = to_cpu(on_gpu)
    assert copy.device.type == "cpu" and copy.is_contiguous() and copy.dtype == dtype
    assert copy.shape == shape and torch.equal(copy, on_gpu.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_does_not_lie_in_a_row_on_a_gpu_comes_as_it_reads():
    matrix = torch.arange(6 * ODD, device="cuda").view(6, ODD)
    for tensor in (matrix.t(), matrix[:, 1:-1], matrix[::2], matrix[0].expand(3, -1)):
        assert torch.equal(to_cpu(tensor), tensor.cpu())
    signs = torch.tensor([0.0, -0.0, torch.nan, torch.inf], device="cuda").repeat(ODD)
    bits = to_cpu(signs).view(torch.int32)
    assert torch.equal(bits, signs.view(torch.int32).cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_is_of_the_moment_when_it_is_asked_for():
    tensor = torch.zeros(3 * ODD, device="cuda")
    for value in range(20):
        tensor.fill_(value)
        copy = to_cpu(tensor)
        tensor.fill_(-1)
        assert (copy == value).all()
