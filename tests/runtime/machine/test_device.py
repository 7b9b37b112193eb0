"""runtime.machine.device: what a pipeline runs in where it is not told."""

import pytest
import torch

from runtime.errors import InputError
from runtime.machine.device import pick_device, pick_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.filterwarnings("ignore:dtype bf16")  # of a CPU that is slow in it
def test_what_is_asked_for_is_taken():
    assert pick_device("cpu") == pick_device(CPU) == CPU
    assert pick_dtype("bf16", CPU) == pick_dtype(torch.bfloat16, CPU) == torch.bfloat16
    assert pick_dtype("fp16", CUDA) == torch.float16


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(None) == CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == CPU


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_type_that_the_device_is_quick_in(monkeypatch, has_it, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_it)
    assert pick_dtype(None, CUDA) == expected
    assert pick_dtype(None, CPU) == torch.float32


def test_what_is_not_to_be_had(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device cuda:1: no CUDA device is available here, expected cpu"):
        pick_device("cuda:1")
    with pytest.raises(InputError, match="device 'gpu': unknown, expected cpu, cuda"):
        pick_device("gpu")
    with pytest.raises(InputError, match="dtype 'int8': unknown, expected fp32, bf16, fp16"):
        pick_dtype("int8", CPU)
