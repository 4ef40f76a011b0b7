"""Ctrl-C and its like: a wish to stop, which a training meets between two steps."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mt.ranks import is_first, world_size


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, to stop between two steps; a second one stops at once.

    Among several processes it does not: torchrun passes on what they may have had already.
    """
    received: list[int] = []
    alone, first = world_size() == 1, is_first()

    def receive(number: int, frame: FrameType | None) -> None:
        if received and alone:
            raise KeyboardInterrupt
        if not received and first:
            once_more = b"; once more stops without saving" if alone else b""
            # What logs is not safe in a handler.
            os.write(2, b"\nstopping after this step" + once_more + b"\n")
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
