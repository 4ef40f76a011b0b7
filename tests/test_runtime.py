"""Every ``auto`` becomes something concrete; what cannot be is refused."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mt import runtime
from mt.config import Device, Precision
from mt.runtime import Runtime, describe_machine, resolve

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_auto_becomes_concrete() -> None:
    found = resolve(device=Device.auto, precision=Precision.auto, num_threads=None)
    if torch.cuda.is_available():
        assert found.device.type == "cuda"
    elif torch.backends.mps.is_available():
        assert found.device.type == "mps"
    else:
        assert found.device.type == "cpu"
    assert found.precision is not Precision.auto
    assert found.num_threads >= 1
    # What was found can be asked for, and comes to the same.
    again = resolve(
        device=Device(found.device.type),
        precision=found.precision,
        num_threads=found.num_threads,
    )
    assert again == found


@pytest.mark.parametrize(("speedup", "expected"), [(3.0, Precision.bf16), (0.2, Precision.fp32)])
def test_bf16_on_a_cpu_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, speedup: float, expected: Precision
) -> None:
    monkeypatch.setattr(runtime, "_bf16_speedup", lambda: speedup)
    found = resolve(device=Device.cpu, precision=Precision.auto, num_threads=1)
    assert found.precision is expected


def test_the_probe_measures_something() -> None:
    assert runtime._bf16_speedup() > 0


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), Precision.bf16), ((7, 5), Precision.fp16)]
)
def test_the_precision_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: Precision
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = resolve(device=Device.auto, precision=Precision.auto, num_threads=1)
    assert found.device.type == "cuda"
    assert found.precision is expected


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(Precision.fp32, torch.float32), (Precision.bf16, torch.bfloat16)],
)
def test_a_precision_has_its_type(precision: Precision, dtype: torch.dtype) -> None:
    found = resolve(device=Device.cpu, precision=precision, num_threads=1)
    assert found.precision is precision
    assert found.dtype is dtype


def test_threads_are_set() -> None:
    found = resolve(device=Device.cpu, precision=Precision.fp32, num_threads=1)
    assert found.num_threads == torch.get_num_threads() == 1


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="fp16 needs a GPU.*use"):
        resolve(device=Device.cpu, precision=Precision.fp16, num_threads=None)


@pytest.mark.parametrize("device", [Device.cuda, Device.mps])
def test_a_device_that_is_not_there_is_refused(device: Device) -> None:
    there = {
        Device.cuda: torch.cuda.is_available(),
        Device.mps: torch.backends.mps.is_available(),
    }
    if there[device]:
        pytest.skip(f"{device.value} is there")
    with pytest.raises(ValueError, match=f"{device.value} is not available.*use auto or cpu"):
        resolve(device=device, precision=Precision.auto, num_threads=None)


def test_a_runtime_in_words() -> None:
    text = str(Runtime(device=torch.device("cpu"), precision=Precision.bf16, num_threads=3))
    assert "cpu" in text
    assert "bf16" in text
    assert "3 threads" in text


def test_the_machine_in_words() -> None:
    facts = describe_machine()
    assert {"system", "processor", "cpus"} <= facts.keys()
    assert json.loads(json.dumps(facts)) == facts


def test_a_process_keeps_more_kernels_than_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before the first product, and never against what the user says."""
    code = (
        "import os; from mt.config import Device, Precision; from mt.runtime import resolve;"
        "resolve(device=Device.cpu, precision=Precision.fp32, num_threads=1);"
        "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    )

    def capacity() -> int:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return int(result.stdout)

    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    assert capacity() > 1024
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "77")
    assert capacity() == 77
