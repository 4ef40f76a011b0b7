#!/usr/bin/env python3
"""Translate text: one line in, one line out.

python scripts/translate.py "And God said, Let there be light."
cat in.txt | python scripts/translate.py > out.txt
python scripts/translate.py -i in.txt -o out.txt -m runs/last -b 8
"""

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from mt.translate import Translator

CHUNK = 1 << 16  # bytes read at once, and so about how much text is sorted and held in memory


def main() -> int:
    """Run the command; return its exit code."""
    options = parse()
    if hasattr(signal, "SIGPIPE") and options.workers == 1:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `translate.py | head` ends quietly
    try:
        with read(options) as chunks, write(options.output) as out:
            for translated in translate(numbered(chunks), options):
                out.writelines(translated)
                out.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the same, where there are workers to be ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BrokenProcessPool:
        message = "a worker process has ended (killed, or out of memory); use fewer --workers"
        print(f"translate.py: error: {message}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"translate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Translate text: one line in, one line out; a blank line stays blank.",
        epilog="Without texts and without --input, lines are read from standard input.",
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to translate")
    parser.add_argument("-i", "--input", metavar="FILE", help="read lines from FILE")
    parser.add_argument("-o", "--output", metavar="FILE", help="write to FILE, once all is done")
    parser.add_argument(
        "-m",
        "--model",
        default="runs/last",
        metavar="DIR",
        help="a run (its best checkpoint) or a model directory (default: %(default)s)",
    )
    parser.add_argument("-b", "--beam-size", type=positive, metavar="K", help="1 is greedy search")
    parser.add_argument(
        "--n-best",
        type=positive,
        metavar="N",
        help="the N best translations, as: number ||| text ||| score (numbers from 0)",
    )
    parser.add_argument(
        "--scores", action="store_true", help="the score and a tab before each translation"
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        metavar="ALPHA",
        help="score = sum of log probabilities / length^ALPHA",
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help="source pieces times beam size searched at once: less memory, or more speed",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="fp32",
        help="of matrix products (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads a worker")
    parser.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="processes that share the lines of --input (default: 1)",
    )
    options = parser.parse_args()
    if options.texts and options.input is not None:
        parser.error("give texts or --input, not both")
    if options.workers > 1 and options.input is None:
        parser.error("--workers goes with --input")
    return options


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def numbered(chunks: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Each chunk with the number of its first line."""
    number = 0
    for texts in chunks:
        yield number, texts
        number += len(texts)


def translate(
    chunks: Iterator[tuple[int, list[str]]], options: argparse.Namespace
) -> Iterator[list[bytes]]:
    """The output of each chunk, in order; by several processes where they are asked for."""
    if options.workers == 1:
        translator = load(options)
        for number, texts in chunks:
            yield list(lines(translator, texts, number=number, options=options))
        return
    if options.threads is None:
        options.threads = max(1, (os.cpu_count() or 1) // options.workers)
    pool = ProcessPoolExecutor(
        options.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=follow_parent,
    )
    waiting: deque[Future[list[bytes]]] = deque()
    try:
        # No more is read than keeps all busy: a text of any length fits into memory.
        for number, texts in itertools.islice(chunks, 2 * options.workers):
            waiting.append(submit(pool, number, texts, options))
        while waiting:
            yield waiting.popleft().result()
            for number, texts in itertools.islice(chunks, 1):
                waiting.append(submit(pool, number, texts, options))
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def submit(
    pool: ProcessPoolExecutor, number: int, texts: list[str], options: argparse.Namespace
) -> Future[list[bytes]]:
    """Hand a chunk to a worker. One that is started for it inherits that Ctrl-C is not for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(work, number, texts, options)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def follow_parent() -> None:
    """End with the parent, even if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_loaded: "list[Translator]" = []  # a worker's own, once it has had something to do


def work(number: int, texts: list[str], options: argparse.Namespace) -> list[bytes]:
    """What a worker does: the output of a chunk."""
    if not _loaded:
        _loaded.append(load(options))
    return list(lines(_loaded[0], texts, number=number, options=options))


def load(options: argparse.Namespace) -> "Translator":
    """The model with the options that were given in place of its own."""
    # Here, so that --help and mistyped options are answered at once.
    from mt.config import Device, Precision
    from mt.translate import Translator

    translator = Translator.load(
        options.model,
        device=Device(options.device),
        precision=Precision(options.precision),
        num_threads=options.threads,
    )
    decode = translator.decode
    beam_size = options.beam_size or decode.beam_size
    alpha = options.length_penalty
    translator.decode = dataclasses.replace(
        decode,
        beam_size=max(beam_size, options.n_best or 1),
        length_penalty=decode.length_penalty if alpha is None else alpha,
        batch_tokens=options.batch_tokens or decode.batch_tokens,
    )
    return translator


def lines(
    translator: "Translator", texts: list[str], *, number: int, options: argparse.Namespace
) -> Iterator[bytes]:
    """The output for texts, of which the first has the given number."""
    translated = translator.translate(texts, n_best=options.n_best or 1)
    for index, translations in enumerate(translated, start=number):
        for translation in translations:
            line = translation.text
            if options.n_best is not None:
                line = f"{index} ||| {line} ||| {translation.score:.4f}"
            elif options.scores:
                line = f"{translation.score:.4f}\t{line}"
            yield f"{line}\n".encode()


@contextlib.contextmanager
def read(options: argparse.Namespace) -> Iterator[Iterable[list[str]]]:
    """The texts to translate, as many at a time as there are at hand."""
    if options.texts:
        yield [options.texts]
    elif options.input is not None:
        with open(options.input, "rb") as file:
            yield chunks_of_lines(file, size=CHUNK // options.workers)
    else:
        if sys.stdin.isatty():
            print("Type a line to translate; Ctrl-D ends.", file=sys.stderr)
        yield chunks_of_lines(sys.stdin.buffer, size=CHUNK)


def chunks_of_lines(file: BinaryIO, *, size: int) -> Iterator[list[str]]:
    """Whatever whole lines a read of ``size`` bytes brings; only newlines separate them.

    From a terminal or another program that is a line as soon as it is there.
    """
    rest = b""
    while chunk := file.read1(size):  # type: ignore[attr-defined]
        *whole, rest = (rest + chunk).split(b"\n")
        if whole:
            yield [line.decode(errors="replace") for line in whole]
    if rest:
        yield [rest.decode(errors="replace")]


@contextlib.contextmanager
def write(output: str | None) -> Iterator[BinaryIO]:
    """Where the lines go. A file gets its name only when it is whole."""
    if output is None:
        yield sys.stdout.buffer
    elif Path(output).exists() and not Path(output).is_file():  # a device or a pipe
        with open(output, "wb") as file:
            yield file
    else:
        target = Path(output).resolve()  # of a link, the file that it points to
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with open(partial, "wb") as file:
                yield file
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
