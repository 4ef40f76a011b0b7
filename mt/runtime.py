"""Device, precision, threads and ranks: every ``auto`` is resolved here, once."""

import ctypes
import logging
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mt import ranks
from mt.config import Device, Precision

log = logging.getLogger(__name__)

DTYPES = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where and how to compute; nothing in it is ``auto``."""

    device: torch.device
    precision: Precision
    num_threads: int  # of this process
    rank: int = 0  # this process among those that train together
    world_size: int = 1  # how many they are

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations in the forward and backward pass."""
        return DTYPES[self.precision]

    def __str__(self) -> str:
        name = cpu_name()
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        threads = f", {self.num_threads} threads" if self.device.type == "cpu" else ""
        several = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{self.device.type} ({name}), {self.precision.value}{threads}{several}"


def resolve(*, device: Device, precision: Precision, num_threads: int | None) -> Runtime:
    """Choose what is left to ``auto``, and set up the process for it.

    Device: CUDA, else MPS, else the CPU. Precision: bf16 on GPUs from compute capability 8.0 on,
    else fp16 on GPUs, fp32 on MPS; on a CPU bf16 where a short probe shows it to be faster.
    Several processes on a machine take a GPU each, or share the cores.

    Raises: ValueError for a device that is not there or cannot do the precision.
    """
    where = _device(device)
    local_rank, local_size = ranks.on_this_machine()
    if where.type == "cuda" and ranks.world_size() > 1:
        where = _own_gpu(local_rank, local_size)
    if num_threads is None and local_size > 1:
        num_threads = max(1, _num_cores() // local_size)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if where.type == "cpu":
        _tune_cpu_libraries()
    if precision is Precision.auto:
        precision = _best_precision(where)
    elif precision is Precision.fp16 and where.type == "cpu":
        raise ValueError("fp16 needs a GPU; on a CPU use precision auto, fp32 or bf16")
    return Runtime(
        device=where,
        precision=precision,
        num_threads=torch.get_num_threads(),
        rank=ranks.rank(),
        world_size=ranks.world_size(),
    )


def _device(device: Device) -> torch.device:
    available = {
        Device.cuda: torch.cuda.is_available(),
        Device.mps: torch.backends.mps.is_available() and ranks.world_size() == 1,
        Device.cpu: True,
    }
    if device is Device.auto:
        device = next(kind for kind, there in available.items() if there)
    if not available[device]:
        raise ValueError(f"device {device.value} is not available here; use auto or cpu")
    return torch.device(device.value)


def _own_gpu(local_rank: int, local_size: int) -> torch.device:
    if local_size > torch.cuda.device_count():
        raise ValueError(
            f"{local_size} processes need a GPU each, and there are {torch.cuda.device_count()}; "
            "start as many as there are GPUs (NPROC=gpu), or use train.device=cpu"
        )
    if not torch.distributed.is_nccl_available():
        raise ValueError(
            "this PyTorch has no NCCL, by which GPUs work together; install one that has, start "
            "one process, or use train.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _num_cores() -> int:
    """The physical cores that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(siblings.format(cpu)).read_text(encoding="utf-8") for cpu in cpus})
    except OSError:
        return len(cpus)


def _best_precision(device: torch.device) -> Precision:
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        return Precision.bf16 if capable else Precision.fp16
    if device.type == "mps":
        return Precision.fp32
    return Precision.bf16 if _bf16_speedup() > 1.3 else Precision.fp32


def _bf16_speedup() -> float:
    """How many times faster a matrix product is in bf16 than in fp32, on this CPU."""
    fp32, bf16 = (_product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
    log.debug("a matrix product takes %.2g s in fp32, %.2g s in bf16", fp32, bf16)
    return fp32 / bf16


def _product_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(512, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(5):  # the first one compiles a kernel
        start = time.perf_counter()
        _ = a @ b
        best = min(best, time.perf_counter() - start)
    return best


def _tune_cpu_libraries() -> None:
    """Two settings of the libraries below PyTorch, worth a tenth of the training speed.

    oneDNN compiles a kernel for every shape of a matrix product and keeps 1,024 of them; the
    shapes of one epoch need a few thousand. glibc hands large blocks back to the kernel as soon
    as they are freed, and pays for each of their pages when it needs them again.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # read at the first product
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # names in malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def compiles(wanted: bool | None, device: torch.device) -> bool:
    """Whether to compile the model; by default on CUDA, where it pays after a few hundred steps.

    Raises: ValueError when it is wanted and there is no C compiler.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    if not has_compiler and wanted:
        raise ValueError("train.compile=true needs a C compiler (cc, gcc or clang); install one")
    if not has_compiler:
        log.warning("without a C compiler (cc, gcc or clang) training is not compiled, and slower")
    return has_compiler


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    words = str(error).lower()
    return "out of memory" in words or "can't allocate memory" in words


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def describe_machine() -> dict[str, str | int]:
    """What a result was obtained on."""
    facts: dict[str, str | int] = {
        "system": platform.platform(),
        "processor": cpu_name(),
        "cpus": os.cpu_count() or 1,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpus"] = torch.cuda.device_count()
    return facts
