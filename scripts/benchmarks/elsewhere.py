"""Something measured in a process of its own, which has none of the app's settings of libraries."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

# Set by the app for itself (mt/runtime.py); a process that is started would inherit it.
OURS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY",)


class Elsewhere:
    """An object that lives in another process, as it would where the app is not installed.

    The memory allocator and the matrix library there are as PyTorch leaves them.
    """

    def __init__(self, build: Callable[..., Any], *, num_threads: int, **arguments: Any) -> None:
        """``build(**arguments)`` makes the object; both travel by pickle."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, build, num_threads, arguments), daemon=True
        )
        kept = {name: os.environ.pop(name) for name in OURS if name in os.environ}
        try:
            self.process.start()
        finally:
            os.environ.update(kept)
        theirs.close()
        self._result()  # of building it

    def call(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns, or the value of an attribute; its errors come along."""
        self.pipe.send((method, arguments))
        return self._result()

    def _result(self) -> Any:
        try:
            error, value = self.pipe.recv()
        except EOFError:
            raise ChildProcessError("the process of the peer has ended") from None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def _serve(
    pipe: Connection, build: Callable[..., Any], num_threads: int, arguments: dict[str, Any]
) -> None:
    torch.set_num_threads(num_threads)
    subject = None
    request: tuple[str, tuple[Any, ...]] | None = None
    while True:
        try:
            if request is None:
                subject, value = build(**arguments), None
            else:
                value = getattr(subject, request[0])
                if callable(value):
                    value = value(*request[1])
            pipe.send((None, value))
        except Exception as error:  # whoever asked is told
            pipe.send((error, None))
        try:
            request = pipe.recv()
        except EOFError:
            return
