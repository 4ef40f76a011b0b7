"""What a measurement needs of the machine: its limit, its clock and its memory."""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

SIZE = 2048  # of the square matrices whose product is the machine's limit
STEPS_AHEAD = 8  # that a host may be before its device, else the clock says nothing of the device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes, until the device is done with it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a 2048 x 2048 x 2048 matrix product: the limit that a model is held against."""
    a = torch.randn(SIZE, SIZE, device=device).to(dtype)
    b = torch.randn(SIZE, SIZE, device=device).to(dtype)
    num_products = 50 if device.type == "cuda" else 1  # one alone is too short for a GPU's clock

    def products() -> None:
        for _ in range(num_products):
            torch.mm(a, b)

    products()
    seconds = statistics.median(seconds_of(products, device) for _ in range(5))
    return num_products * 2 * SIZE**3 / seconds


def forget_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` count from here on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: the GPU's tensors, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # elsewhere; the unit is the byte on macOS

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def median_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """The median of ours / peer over the pairs that were measured one right after the other."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))
