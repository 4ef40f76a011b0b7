#!/usr/bin/env python3
"""Measure speed, next to the machine's limit and next to a peer.

python scripts/bench.py train --peer hf
python scripts/bench.py train --peer hf model=base data=bible
python scripts/bench.py decode --peer hf --batch 1 32 --beam 5
python scripts/bench.py decode --model runs/last --text test.en
python scripts/bench.py corpus --pairs 1000000
python scripts/bench.py gpu --prepare FOLDER     # where the corpora are
python scripts/bench.py gpu --from FOLDER        # where the GPU is
python scripts/bench.py table runs/bench.json

Settings (SETTING=value) are those of scripts/train.py; the subject is the model "small" with
8,000 pieces on Multi30k where they name nothing else. Each measurement is a row of the results;
an older one of the same name is replaced.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import results

SUBJECT = ["model=small", "tokenizer.vocab_size=8000", "optim=adamw", "train.batch_tokens=4096"]


def main() -> int:
    """Run the command; return its exit code."""
    options = parse()
    try:
        options.run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        about = (run.__doc__ or "").split("\n")[0]
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    train = command("train", run_train)
    train.add_argument("--seconds", type=float, default=10.0, help="of a turn (default: 10)")
    train.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    train.add_argument("--warm-up", type=float, default=10.0, help="seconds (default: 10)")
    train.add_argument(
        "--peer-choice",
        choices=[f"{a} {b}" for a in ("fp32", "bf16") for b in ("eager", "sdpa")],
        help="the peer's precision and attention (default: try all, take the fastest)",
    )

    decode = command("decode", run_decode)
    decode.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256], metavar="B")
    decode.add_argument("--beam", type=int, nargs="+", default=[1, 5], metavar="K")
    decode.add_argument("--length", type=int, default=20, help="pieces a sentence (default: 20)")
    decode.add_argument(
        "--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="of ours"
    )
    decode.add_argument("--seconds", type=float, default=5.0, help="of a row (default: 5)")
    decode.add_argument("--rounds", type=int, default=3, help="least calls a side (default: 3)")
    decode.add_argument("--model", metavar="DIR", help="a trained model, at its real lengths")
    decode.add_argument("--text", type=Path, metavar="FILE", help="what it translates, by line")

    corpus = command("corpus", run_corpus)
    corpus.add_argument("--pairs", type=int, default=1_000_000, help="(default: 1,000,000)")
    corpus.add_argument("--folder", type=Path, default=Path("data/bench"), help="for its files")

    gpu = command("gpu", run_gpu)
    which = gpu.add_mutually_exclusive_group(required=True)
    which.add_argument("--prepare", type=Path, metavar="FOLDER", help="fill it with all needed")
    which.add_argument("--from", type=Path, metavar="FOLDER", dest="source", help="measure")
    gpu.add_argument("--only", choices=["train", "decode", "quality"], help="one kind of row")

    for sub in (train, decode, corpus, gpu):
        sub.add_argument(
            "--out", type=Path, default=Path("runs/bench.json"), metavar="FILE", help="results"
        )
    for sub in (train, decode, gpu):
        sub.add_argument("--peer", choices=["hf"], help="measure Hugging Face transformers, too")
    for sub in (train, decode):
        sub.add_argument("settings", nargs="*", metavar="SETTING", help="as in scripts/train.py")

    table = command("table", run_table)
    table.add_argument("file", type=Path, nargs="?", default=Path("runs/bench.json"))
    return parser.parse_args()


def run_train(options: argparse.Namespace) -> None:
    """Training: target tokens a second, padding, memory, share of the machine's limit."""
    from benchmarks.subject import compose_subject

    config = compose_subject(SUBJECT, options.settings)
    from benchmarks.train import measure_training
    from mt.corpus import prepare

    corpus = prepare(config.data, config.tokenizer)
    row = measure_training(
        config,
        corpus,
        with_peer=options.peer is not None,
        peer_choice=options.peer_choice,
        num_rounds=options.rounds,
        seconds=options.seconds,
        warm_up=options.warm_up,
    )
    results.store(options.out, row)


def run_decode(options: argparse.Namespace) -> None:
    """Decoding: sentences and target tokens a second, milliseconds a sentence."""
    if (options.model is None) != (options.text is None):
        raise ValueError("--model and --text go together")
    if options.model and (options.peer or options.settings):
        raise ValueError("--model is measured alone, and brings its own settings")
    from benchmarks.decode import measure_decoding, measure_model

    if options.model is None:
        from benchmarks.subject import compose_subject

        config = compose_subject(SUBJECT, options.settings)
    for batch_size in options.batch:
        for beam_size in options.beam:
            if options.model is not None:
                row = measure_model(
                    options.model,
                    options.text,
                    batch_size=batch_size,
                    beam_size=beam_size,
                    dtypes=options.dtype,
                )
            else:
                row = measure_decoding(
                    config,
                    batch_size=batch_size,
                    beam_size=beam_size,
                    length=options.length,
                    dtypes=options.dtype,
                    with_peer=options.peer is not None,
                    num_rounds=options.rounds,
                    seconds=options.seconds,
                )
            results.store(options.out, row)


def run_corpus(options: argparse.Namespace) -> None:
    """Preparing a corpus: how long it takes, and how much memory."""
    from benchmarks.corpus import measure_corpus

    measured = measure_corpus(options.pairs, options.folder)
    results.store(
        options.out, {"kind": "corpus", "name": f"corpus {options.pairs} pairs", **measured}
    )


def run_gpu(options: argparse.Namespace) -> None:
    """All that is to be measured on a GPU; rows that the results have are left out."""
    from benchmarks import gpu

    if options.prepare is not None:
        gpu.prepare_folder(options.prepare)
    else:
        gpu.measure_folder(
            options.source,
            options.out.resolve(),
            only=options.only,
            with_peer=options.peer is not None,
        )


def run_table(options: argparse.Namespace) -> None:
    """Print results as Markdown."""
    print(results.table(results.load(options.file)))


if __name__ == "__main__":
    raise SystemExit(main())
