"""What a corpus of a given size costs: preparation, memory, the first step.

Text is made up, with the lengths of sentences and the frequencies of words that text has; it is
prepared, and a training takes one step on it.
"""

import itertools
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mt.batching import BatchOrder, Sequences, load_batch
from mt.config import TrainConfig
from mt.corpus import find

SCRIPTS = Path(__file__).resolve().parent.parent
NUM_WORDS = 100_000  # of a language
CHUNK = 50_000  # pairs written at once
VOCAB_SIZE = 8000

# What may begin, carry and end a syllable; - is nothing.
ENGLISH = ("- b c d f g h l m n p r s t w st th pr", "a e i o u ea ou", "- n r s t ng ck")
GERMAN = ("- b d f g h k l m n r s t w z sch st pf", "a e i o u ä ö ü ei au ie", "- n r s t ch ung")


def measure_corpus(num_pairs: int, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of preparation, first training step and an epoch's plan.

    The text and all that comes of it stay in ``folder``. Memory is that of the largest process,
    mapped pages included.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    write_corpus(num_pairs, folder)
    writing = time.perf_counter() - start
    settings = [
        "data=files",
        "data.name=bench",
        f"data.train={folder / 'train'}",
        f"tokenizer.vocab_size={VOCAB_SIZE}",
    ]
    prepared = _run(["prepare.py", *settings], folder, until="data/prepared/")
    path = folder / prepared["line"].split()[-1]
    step = ["train.max_steps=1", "train.log_every=1", "train.valid_sentences=1"]
    step += ["train.final_eval=none", "train.resume=never"]
    trained = _run(["train.py", *settings, *step], folder, until="step 1 of 1")
    return {
        "num_pairs": num_pairs,
        "write_seconds": writing,
        "prepare_seconds": prepared["seconds"],
        "prepare_pairs_per_second": num_pairs / prepared["seconds"],
        "prepare_peak_mb": prepared["peak_mb"],
        "first_step_seconds": trained["line_seconds"],
        "train_peak_mb": trained["peak_mb"],
        **measure_order(path),
    }


def measure_order(path: Path, *, num_batches: int = 200) -> dict[str, float]:
    """Seconds and memory of an epoch's plan, and the time that it takes to make a batch."""
    corpus = find(path)
    assert corpus is not None
    columns = [corpus.train.data.column(f"{side}_ids").chunks for side in ("source", "target")]
    sources, targets = map(Sequences, columns)
    defaults = TrainConfig()
    tracemalloc.start()
    order = BatchOrder(
        sources.lengths + 1,
        targets.lengths + 1,
        max_tokens=defaults.batch_tokens,
        max_length=defaults.max_length,
        seed=1,
    )
    plan = order.epoch(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    start = time.perf_counter()
    plan = order.epoch(1)
    planning = time.perf_counter() - start
    start = time.perf_counter()
    for batch in plan[:num_batches]:
        load_batch(sources, targets, batch)
    loading = time.perf_counter() - start
    return {
        "plan_seconds": planning,
        "plan_peak_mb": peak / 1e6,
        "load_batch_ms": 1000 * loading / len(plan[:num_batches]),
    }


def _run(command: Sequence[str], folder: Path, *, until: str) -> dict[str, Any]:
    """Run a script in ``folder``: its duration, its memory, and the first line with ``until``."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / command[0]), *command[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines, found = [], {}
    for line in process.stdout:
        lines.append(line)
        if not found and until in line:
            found = {"line": line, "line_seconds": time.perf_counter() - start}
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or not found:
        raise RuntimeError(f"{command[0]} failed:\n{''.join(lines[-30:])}")
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = time.perf_counter() - start
    return {**found, "seconds": seconds, "peak_mb": usage.ru_maxrss * unit / 1e6}


# Text


def write_corpus(num_pairs: int, folder: Path) -> None:
    """Files train.en and train.de in ``folder``, the same every time."""
    random = np.random.default_rng(1)
    vocabularies = [_words(random, *parts) for parts in (ENGLISH, GERMAN)]
    frequencies = 1 / (np.arange(NUM_WORDS) + 2.7)  # Zipf and Mandelbrot
    shares = np.cumsum(frequencies) / frequencies.sum()
    with (folder / "train.en").open("wb") as english, (folder / "train.de").open("wb") as german:
        for start in range(0, num_pairs, CHUNK):
            num_lines = min(CHUNK, num_pairs - start)
            lengths = np.clip(random.lognormal(2.95, 0.55, num_lines).astype(int), 1, 120)
            words = np.searchsorted(shares, random.random(lengths.sum()))
            lines = np.repeat(np.arange(num_lines), lengths)
            _write(english, vocabularies[0], words, lengths)
            kept = random.random(len(words)) > 0.05  # a translation has another length
            lengths = np.bincount(lines[kept], minlength=num_lines)
            _write(german, vocabularies[1], words[kept], lengths)


def _words(random: np.random.Generator, *parts: str) -> pa.Array:
    """Different words, the most frequent first; they are the longer, the rarer."""
    choices = [["" if part == "-" else part for part in side.split()] for side in parts]
    syllables = ["".join(chosen) for chosen in itertools.product(*choices)]
    rarity = np.log10(np.arange(1, NUM_WORDS + 1))
    words: dict[str, None] = {}
    for number in (1 + np.minimum(random.poisson(0.3 * rarity), 4)).tolist():
        word = ""
        while not word or word in words:
            word += "".join(syllables[i] for i in random.integers(len(syllables), size=number))
        words[word] = None
    return pa.array(list(words))


def _write(file: Any, vocabulary: pa.Array, words: np.ndarray, lengths: np.ndarray) -> None:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    lines = pa.ListArray.from_arrays(offsets, vocabulary.take(pa.array(words)))
    text = pc.utf8_capitalize(pc.binary_join(lines, " "))
    file.write("".join(f"{line}.\n" for line in text.to_pylist()).encode())
