"""What is to be measured on a GPU: prepared where the corpora are, measured where the GPU is.

The folder that goes from one to the other::

    train/*.yaml     configs whose training speed is measured
    decode/*.yaml    configs whose decoding speed is measured
    quality/*.yaml   experiments, trained once for each of three seeds and scored
    data/            their text, raw and prepared
    runs/            the trainings

The second machine needs the dependencies of the app, but no network.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks import results
from mt.config import Config, load_config, save_config

# Each with the usual settings that the subject is made of: see subject.py.
CONFIGS = {
    "train/base-8192": ["model=base", "train.batch_tokens=8192"],
    "train/base-32768": ["model=base", "train.batch_tokens=32768"],
    "decode/base": ["model=base"],
    "quality/multi30k_tok": ["experiment=multi30k_tok"],
}
USUAL = ["tokenizer.vocab_size=8000", "optim=muon", "train.precision=bf16"]
SEEDS = (1, 2, 3)
BEAM_SIZE, BATCH_SIZE, LENGTH = 4, 256, 20


def prepare_folder(folder: Path) -> None:
    """Fill the folder with configs, raw text and prepared text; what is there is kept."""
    from benchmarks.subject import compose_subject
    from mt.corpus import prepare

    configs: dict[str, Config] = {}
    for name, overrides in CONFIGS.items():
        usual = [] if name.startswith("quality/") else USUAL
        configs[name] = compose_subject(usual, overrides)
    for name, config in configs.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, path)
        for file in _raw_files(config):
            copy = folder / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    os.chdir(folder)
    for config in configs.values():
        prepare(config.data, config.tokenizer)
    print(f"{folder} is ready")


def _raw_files(config: Config) -> list[Path]:
    """The files of the config's corpus: the training may look whether they have changed."""
    data = config.data
    prefixes = [Path(path) for path in (data.train, data.valid, data.test) if path is not None]
    files = [
        file
        for prefix in prefixes
        for language in (data.source_lang, data.target_lang)
        for file in prefix.parent.glob(f"{prefix.name}.{language}*")
    ]
    if len(files) != 2 * len(prefixes) or any(file.is_absolute() for file in files):
        raise ValueError(
            f"the text of {data.name} must lie in files such as {prefixes[0]}.{data.source_lang}, "
            f"below this folder; found {', '.join(map(str, files)) or 'none'}"
        )
    return files


def measure_folder(folder: Path, out: Path, *, only: str | None, with_peer: bool) -> None:
    """Measure all that the folder asks for and the results lack; ``out`` is an absolute path."""
    os.chdir(folder)
    measures = {"train": _measure_train, "decode": _measure_decode, "quality": _measure_quality}
    for kind, measure in measures.items():
        for path in sorted(Path(kind).glob("*.yaml")) if only in (None, kind) else []:
            seeds = SEEDS if kind == "quality" else (None,)
            for seed in seeds:
                name = f"gpu: {kind} {path.stem}" + ("" if seed is None else f" seed {seed}")
                if name in results.load(out):
                    print(f"{name} is there already")
                    continue
                config = load_config(path)
                if seed is not None:
                    config.train.seed = seed
                row = measure(config, with_peer=with_peer)
                results.store(out, row | {"name": name})


def _measure_train(config: Config, *, with_peer: bool) -> dict[str, Any]:
    from benchmarks.train import measure_training
    from mt.corpus import prepare

    corpus = prepare(config.data, config.tokenizer)
    return measure_training(
        config, corpus, with_peer=with_peer, num_rounds=3, seconds=10, warm_up=60
    )


def _measure_decode(config: Config, *, with_peer: bool) -> dict[str, Any]:
    from benchmarks.decode import measure_decoding

    return measure_decoding(
        config,
        batch_size=BATCH_SIZE,
        beam_size=BEAM_SIZE,
        length=LENGTH,
        dtypes=["fp32", "bf16"],
        with_peer=with_peer,
        num_rounds=10,
        seconds=10,
    )


def _measure_quality(config: Config, *, with_peer: bool) -> dict[str, Any]:
    """Train, and score tokens against tokens: for text that is tokenized and lowercased already."""
    from sacrebleu.metrics.bleu import BLEU

    from benchmarks.train import OurTraining
    from mt.corpus import prepare
    from mt.runs import Run
    from mt.runtime import resolve
    from mt.train import train

    run = Run(train(config))
    assert run.best is not None
    hypotheses, references = (
        (run.best / "eval" / f"test.{kind}.txt").read_text(encoding="utf-8").split("\n")[:-1]
        for kind in ("hypothesis", "reference")
    )
    finished = json.loads((run.path / "finished.json").read_text(encoding="utf-8"))
    metric = BLEU(tokenize="none", force=True)  # force: no warning that it is tokenized
    bleu = metric.corpus_score(hypotheses, [references]).score

    # A step's duration with all kernels compiled, and with nothing between the steps.
    settings = config.train
    runtime = resolve(
        device=settings.device, precision=settings.precision, num_threads=settings.num_threads
    )
    again = OurTraining(config, prepare(config.data, config.tokenizer), runtime)
    again.run(30)
    before = again.num_steps
    turn = again.run(10)
    return {
        "kind": "quality",
        "subject": f"{config.data.name}, {config.model.name}",
        "device": str(runtime),
        "seed": settings.seed,
        "bleu": bleu,
        "signature": str(metric.get_signature()),
        "num_sentences": len(references),
        "num_steps": finished["step"],
        "seconds": finished["seconds"],  # with validation, checkpoints and compilation
        "step_seconds": turn.seconds / (again.num_steps - before),
    }
