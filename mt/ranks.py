"""The processes that train one model together: who leads, and what they tell each other.

torchrun starts them, numbered from 0, and tells each its number in the environment. Without it
there is one process, which leads, and nothing below costs anything.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

# How long the others wait for the first one, which alone prepares, validates and saves. A process
# that is gone is noticed at once, whatever this says.
PATIENCE = timedelta(hours=4)

T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, on all machines together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process leads: it alone writes files and speaks."""
    return rank() == 0


def on_this_machine() -> tuple[int, int]:
    """(this process's number, how many there are), counting those on this machine only."""
    if not distributed.is_initialized():
        return 0, 1
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


@contextmanager
def joined() -> Iterator[None]:
    """Belong to the processes that torchrun has started; all of them leave together.

    Raises: ValueError in one process only, the one that is to speak, when it or several fail; the
    others then end with SystemExit.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, number, size = next(rendezvous("env://"))
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
        store=store,
        rank=number,
        world_size=size,
        timeout=PATIENCE,
    )
    try:
        yield
        largest(0)  # the first one has more to do than the others
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            if not _is_about_another(error):
                raise
            error = ValueError(
                "another process of this training has ended; the same command goes on from the "
                f"last checkpoint ({error})"
            )
        if number:  # a failure of all is the first one's to tell, and one of this process is
            time.sleep(1)  # told soon enough
        if store.add("failed", 1) > 1:
            raise SystemExit(2) from None
        raise error
    except SystemExit:
        distributed.destroy_process_group()
        raise
    else:
        distributed.destroy_process_group()
    finally:
        # gloo's threads still let go of what they have sent. They need the interpreter for that,
        # and where it ends first, they abort the process.
        time.sleep(0.1)


def _is_about_another(error: RuntimeError) -> bool:
    """Whether an exchange broke off because a process is gone: the cause lies there."""
    words = str(error).lower()
    return isinstance(error, distributed.DistError) or " by peer" in words or "gloo" in words


def agree(function: Callable[[], T]) -> T:
    """What ``function`` returns in the first process, which alone calls it; in all of them."""
    if world_size() == 1:
        return function()
    message = [function() if is_first() else None]
    distributed.broadcast_object_list(message, src=0, device=torch.device("cpu"))
    return message[0]  # type: ignore[return-value]


def largest(number: int) -> int:
    """The largest number that any process brings; the hosts wait for each other."""
    if world_size() == 1:
        return number
    message = torch.tensor(number)
    distributed.all_reduce(message, op=distributed.ReduceOp.MAX)
    return int(message)


def add_up(numbers: Tensor) -> None:
    """Replace numbers by their sums over all processes, on their device."""
    distributed.all_reduce(numbers)


def shared(module: nn.Module) -> nn.Module:
    """A module whose gradients are the means over all processes, once backward is done."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True)
