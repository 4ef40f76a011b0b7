"""How good a model is: sacreBLEU and chrF with significance, and the loss on held-out text."""

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from mt import corpus
from mt.batching import Batch, collate, length_batches
from mt.checkpoint import LoadedModel, find_model, load_model
from mt.config import EvalConfig, EvaluateConfig
from mt.loss import cross_entropy
from mt.model import Transformer
from mt.runtime import Runtime, resolve
from mt.tokenizer import PAD, normalize
from mt.translate import Translator, length_bounds

NUM_RESAMPLES = 1000  # of the bootstrap
BATCH_TOKENS = 8192  # target pieces a batch of the held-out loss

# sacreBLEU's default separates words at spaces; these languages write none.
_WORDS = {"zh": "zh", "ja": "char", "th": "char", "km": "char", "lo": "char", "my": "char"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Text to score on."""

    name: str  # of the files that the results go to
    sources: list[str]
    references: list[str]
    num_leaked: int | None  # None: nobody has looked whether the training text repeats it


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Translate held-out text, score it, and write ``<model dir>/eval/<split>.json`` and texts.

    Returns what the JSON file holds; ``table`` makes it readable. ``ValueError`` where there is
    no model, no corpus or no text.
    """
    settings = config.eval
    runtime = resolve(
        device=settings.device, precision=settings.precision, num_threads=settings.num_threads
    )
    loaded = _load(settings.model, runtime)
    held_out = (
        _files(settings) if settings.source or settings.reference else _split(settings, loaded)
    )
    systems: dict[str, list[str]] = {}
    if settings.baseline is not None:
        baseline = _load(settings.baseline, runtime)
        systems["baseline"], _ = _translate(Translator(baseline, runtime, config.decode), held_out)
    systems["model"], seconds = _translate(Translator(loaded, runtime, config.decode), held_out)

    batches = _batches(loaded, held_out)
    loss = heldout_loss(loaded.model, batches, runtime)
    result = {
        "model": str(loaded.path),
        "step": loaded.info["step"],
        "text": held_out.name,
        "num_sentences": len(held_out.sources),
        "num_leaked": held_out.num_leaked,
        **score(systems, held_out.references, target_lang=loaded.config.data.target_lang),
        "loss": loss,
        "perplexity": perplexity(loss),
        "num_cut": num_cut(loaded.model, batches, runtime, max_length=config.decode.max_length),
        "seconds": seconds,
        "decode": dataclasses.asdict(config.decode),
        "device": str(runtime.device),
        "precision": runtime.precision.value,
    }
    if settings.baseline is not None:
        result["baseline"]["model"] = str(baseline.path)
    _write(loaded.path / "eval", held_out, systems["model"], result)
    return result


def score(
    systems: dict[str, list[str]], references: list[str], *, target_lang: str = ""
) -> dict[str, Any]:
    """sacreBLEU and chrF of the last of the systems (name -> its outputs), 0 to 100.

    Keys: bleu, chrf, bleu_interval and chrf_interval (95 %, bootstrap), signatures, and baseline:
    None, or where there are two systems the first one's bleu and chrf with bleu_p_value and
    chrf_p_value, how likely so large a difference is by chance (paired bootstrap, Koehn 2004).
    """
    test = PairedTest(
        list(systems.items()),
        metrics={"BLEU": _bleu(target_lang), "chrF": CHRF()},
        references=[references],
        test_type="bs",
        n_samples=NUM_RESAMPLES,
    )
    signatures, scores = test()
    result: dict[str, Any] = {"signatures": {}, "baseline": None}
    baseline: dict[str, Any] = {}
    for key, name in (("bleu", "BLEU"), ("chrf", "chrF2")):
        results: Any = scores[name]
        first, last = results[0], results[-1]
        result[key] = last.score
        result[f"{key}_interval"] = [float(last.mean - last.ci), float(last.mean + last.ci)]
        result["signatures"][key] = str(signatures[name])
        baseline |= {key: first.score, f"{key}_p_value": last.p_value}
    if len(systems) > 1:
        result["baseline"] = baseline
    return result


def quick_scores(
    hypotheses: Sequence[str], references: Sequence[str], *, target_lang: str = ""
) -> tuple[float, float]:
    """(sacreBLEU, chrF), each 0 to 100."""
    bleu = _bleu(target_lang).corpus_score(hypotheses, [references])
    chrf = CHRF().corpus_score(hypotheses, [references])
    return bleu.score, chrf.score


@torch.inference_mode()
def heldout_loss(model: Transformer, batches: Iterable[Batch], runtime: Runtime) -> float:
    """The mean cross-entropy of a target piece (EOS included), without smoothing or dropout."""
    was_training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    for batch in batches:
        batch = batch.to(runtime.device)
        memory = model.encode(batch.source, batch.source_mask)
        states = model.decode(batch.target_in, memory, batch.source_mask)
        logits = model.logits(states[batch.target_mask])  # [num_tokens, V]
        total += float(cross_entropy(logits, batch.target_out[batch.target_mask], ignore=PAD))
        num_tokens += batch.num_tokens
    model.train(was_training)
    return total / max(1, num_tokens)


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that is too large."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.inference_mode()
def num_cut(
    model: Transformer, batches: Iterable[Batch], runtime: Runtime, *, max_length: int
) -> int:
    """How many references the search could not have written, being longer than its bound."""
    count = 0
    for batch in batches:
        batch = batch.to(runtime.device)
        log_ratios = None
        if model.length_head is not None:
            memory = model.encode(batch.source, batch.source_mask)
            log_ratios = model.log_length_ratio(memory, batch.source_mask)
        bounds = length_bounds(batch.source_mask.sum(1), log_ratios, max_length=max_length)
        count += int((batch.target_mask.sum(1) > bounds).sum())
    return count


def table(result: dict[str, Any]) -> str:
    """A result of ``evaluate`` in a few lines."""
    leaked = "unknown" if result["num_leaked"] is None else result["num_leaked"]
    rows = [
        f"model  {result['model']}, step {result['step']}",
        f"text   {result['text']}, {result['num_sentences']} sentences, {result['seconds']:.1f} s, "
        f"held-out sentences found in the training text before cleaning: {leaked}",
    ]
    baseline = result["baseline"]
    for key, name in (("bleu", "BLEU"), ("chrf", "chrF")):
        low, high = result[f"{key}_interval"]
        row = f"{name:<6} {result[key]:5.2f}  [{low:.2f}, {high:.2f}]  {result['signatures'][key]}"
        if baseline is not None:
            row += f"  baseline {baseline[key]:.2f}, p = {baseline[f'{key}_p_value']:.4f}"
        rows.append(row)
    if baseline is not None:
        rows.append(f"baseline  {baseline['model']}")
    rows.append(f"loss   {result['loss']:.3f}, perplexity {result['perplexity']:.2f}")
    return "\n".join(rows)


def _bleu(target_lang: str) -> BLEU:
    return BLEU(tokenize=_WORDS.get(target_lang, "13a"))


def _translate(translator: Translator, held_out: HeldOut) -> tuple[list[str], float]:
    """(the translations, seconds that they took)"""
    log.info("translating %d sentences", len(held_out.sources))
    start = time.perf_counter()
    texts = [best[0].text for best in translator.translate(held_out.sources)]
    return texts, time.perf_counter() - start


def _load(path: str, runtime: Runtime) -> LoadedModel:
    return load_model(find_model(path), device=runtime.device, dtype=runtime.dtype)


def _split(settings: EvalConfig, loaded: LoadedModel) -> HeldOut:
    """The held-out part of the corpus that the model was trained on."""
    try:
        prepared = corpus.prepare(loaded.config.data, loaded.config.tokenizer)
    except ValueError as error:
        raise ValueError(
            f"cannot open the corpus of {loaded.path}: {error}\n"
            "Other text can be scored with eval.source=FILE eval.reference=FILE"
        ) from error
    split = getattr(prepared, settings.split.value)
    if not len(split):
        raise ValueError(f"the corpus {loaded.config.data.name} has no {settings.split.value} text")
    return HeldOut(
        name=settings.split.value,
        sources=list(split["source"]),
        references=list(split["target"]),
        num_leaked=loaded.info["num_leaked"],
    )


def _files(settings: EvalConfig) -> HeldOut:
    """The user's own text."""
    if settings.source is None or settings.reference is None:
        raise ValueError("eval.source and eval.reference go together; give both files")
    sources, references = _lines(settings.source), _lines(settings.reference)
    if len(sources) != len(references):
        raise ValueError(
            f"{settings.source} has {len(sources)} lines, {settings.reference} {len(references)}; "
            "they must be translations of each other, line by line"
        )
    if not sources:
        raise ValueError(f"{settings.source} is empty")
    return HeldOut(f"file-{Path(settings.source).name}", sources, references, None)


def _lines(path: str) -> list[str]:
    """The lines of a UTF-8 file, normalized; only newlines separate them."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    lines = raw.removesuffix(b"\n").split(b"\n") if raw else []
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(normalize(line.decode()))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8; convert the file first") from error
    return texts


def _batches(loaded: LoadedModel, held_out: HeldOut) -> list[Batch]:
    """The pairs as batches, but for those longer than any in training."""
    longest = loaded.config.train.max_length
    pairs = [
        (source, target)
        for source, target in zip(
            loaded.tokenizer.encode(held_out.sources),
            loaded.tokenizer.encode(held_out.references),
            strict=True,
        )
        if max(len(source), len(target)) < longest
    ]
    lengths = [max(len(source), len(target)) + 1 for source, target in pairs]
    return [
        collate([pairs[index][0] for index in batch], [pairs[index][1] for index in batch])
        for batch in length_batches(lengths, max_tokens=BATCH_TOKENS)
    ]


def _write(folder: Path, held_out: HeldOut, hypotheses: list[str], result: dict[str, Any]) -> None:
    """Each file appears whole or not at all, the JSON file last."""
    folder.mkdir(exist_ok=True)
    contents = {
        f"{kind}.txt": "".join(f"{line}\n" for line in lines)
        for kind, lines in (
            ("source", held_out.sources),
            ("hypothesis", hypotheses),
            ("reference", held_out.references),
        )
    }
    contents["json"] = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    for ending, content in contents.items():
        path = folder / f"{held_out.name}.{ending}"
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
