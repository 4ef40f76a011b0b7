"""torchrun, with an end that a person can read: scripts/launch.py TORCHRUN-OPTIONS PROGRAM ...

The program has said what is wrong, or that it was stopped. torchrun would add its own traceback,
end with 1 whatever the program ended with, and leave a stopped program half a minute to save.
"""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

SECONDS_TO_SAVE = 120  # after Ctrl-C; what is still there then is killed

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # till the program counts the cores
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    logging.disable(logging.ERROR)
    try:
        main()
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            again = "the same command goes on from the last checkpoint"
            print(f"error: process {first.pid} was ended by {name}; {again}", file=sys.stderr)
            sys.exit(128 - first.exitcode)
        sys.exit(first.exitcode)
