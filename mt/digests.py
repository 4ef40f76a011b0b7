"""SHA-256 of files, remembered: a large file is not read again while it looks untouched."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

# A file that changes twice within one tick of its file system's clock looks untouched since the
# first change. So what is read too soon after a change is not remembered.
TICK = 2_000_000_000  # ns; the coarsest clocks in use


def digests(files: Iterable[Path], *, memory: Path) -> dict[Path, str]:
    """The SHA-256 of each file.

    ``memory`` is a JSON file that keeps digests from call to call, made where it is missing. A
    digest holds while its file has the same size and the same time of change (ctime, which
    programs cannot set). Damage that the file system did not see is not found that way; deleting
    ``memory`` makes sure that every byte is read.

    Raises: OSError where a file cannot be read.
    """
    known = _recall(memory)
    found, fresh = {}, {}
    for file in files:
        name = os.path.relpath(file, memory.parent)  # still right where both are moved
        facts = file.stat()
        look = f"{facts.st_size} bytes, changed {facts.st_ctime_ns}"
        if known.get(name, {}).get("look") == look:
            found[file] = known[name]["sha256"]
            continue
        settled = time.time_ns() - facts.st_ctime_ns > TICK
        with file.open("rb") as stream:
            found[file] = hashlib.file_digest(stream, "sha256").hexdigest()
        if settled:
            fresh[name] = {"look": look, "sha256": found[file]}
    if fresh:
        _remember(memory, known | fresh)
    return found


def _recall(memory: Path) -> dict[str, dict[str, str]]:
    try:
        return json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: then everything is read
        return {}


def _remember(memory: Path, known: dict[str, dict[str, str]]) -> None:
    partial = memory.with_name(f"{memory.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a folder that cannot be written to is read every time
        partial.write_text(json.dumps(known, indent=2), encoding="utf-8")
        os.replace(partial, memory)
