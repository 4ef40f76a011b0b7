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
from mt.translate import Translator, length_bounds, primary_language, writes_spaces

NUM_RESAMPLES = 1000  # of the bootstrap
BATCH_TOKENS = 4096  # padded pieces a side, a batch of the held-out loss


log = logging.getLogger(__name__)
logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # else it tells of each resampling


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
        _same_languages(baseline, loaded)
        search = config.decode.over(baseline.config.decode)
        systems["baseline"], _ = _translate(
            Translator.of(baseline, runtime, decode=search), held_out
        )
    decode = config.decode.over(loaded.config.decode)
    systems["model"], seconds = _translate(Translator.of(loaded, runtime, decode=decode), held_out)

    pairs = list(
        zip(
            loaded.tokenizer.encode(held_out.sources),
            loaded.tokenizer.encode(held_out.references),
            strict=True,
        )
    )
    batches = loss_batches(pairs, max_length=loaded.config.train.max_length)
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
        "num_pairs_with_loss": sum(len(batch.source) for batch in batches),
        "num_cut": num_cut(loaded.model, pairs, runtime, max_length=decode.max_length),
        "seconds": seconds,
        "decode": dataclasses.asdict(decode),
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
    return total / num_tokens if num_tokens else math.nan


def loss_batches(
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]], *, max_length: int
) -> list[Batch]:
    """Pairs of ids as batches for the loss, but for those longer than any in training."""
    kept = [pair for pair in pairs if max(map(len, pair)) < max_length]
    lengths = [max(map(len, pair)) + 1 for pair in kept]  # with EOS
    return [
        collate([kept[index][0] for index in batch], [kept[index][1] for index in batch])
        for batch in length_batches(lengths, max_tokens=BATCH_TOKENS)
    ]


def perplexity(loss: float) -> float:
    """exp(loss), at most 10^300."""
    return math.exp(min(loss, 690.0))


@torch.inference_mode()
def num_cut(
    model: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    runtime: Runtime,
    *,
    max_length: int,
) -> int:
    """How many references the search could not have written, being longer than its bound.

    ``pairs`` are ids of sources and references, of any length.
    """
    count = 0
    lengths = [len(source) + 1 for source, _ in pairs]  # with EOS
    for indices in length_batches(lengths, max_tokens=BATCH_TOKENS):
        batch = collate([pairs[i][0] for i in indices], [pairs[i][1] for i in indices])
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
    leaked = "nobody knows how many" if result["num_leaked"] is None else result["num_leaked"]
    rows = [
        f"model  {os.path.relpath(result['model'])}, step {result['step']}",
        f"text   {result['text']}, {result['num_sentences']} sentences, translated in "
        f"{result['seconds']:.1f} s; {leaked} of them stood in the training text before cleaning",
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
    rows.append(
        f"loss   {result['loss']:.3f}, perplexity {result['perplexity']:.2f}; "
        f"{result['num_cut']} references are longer than the search may write"
    )
    return "\n".join(rows)


def _bleu(target_lang: str) -> BLEU:
    """sacreBLEU's default separates words at spaces; where none are written, characters count."""
    if primary_language(target_lang) == "zh":
        return BLEU(tokenize="zh")
    return BLEU(tokenize="13a" if writes_spaces(target_lang) else "char")


def _translate(translator: Translator, held_out: HeldOut) -> tuple[list[str], float]:
    """(the translations, seconds that they took)"""
    log.info("translating %d sentences", len(held_out.sources))
    start = time.perf_counter()
    texts = [best[0].text for best in translator.translate(held_out.sources)]
    return texts, time.perf_counter() - start


def _load(path: str, runtime: Runtime) -> LoadedModel:
    return load_model(find_model(path), device=runtime.device, dtype=runtime.dtype)


def _same_languages(baseline: LoadedModel, loaded: LoadedModel) -> None:
    pairs = [
        (model.config.data.source_lang, model.config.data.target_lang)
        for model in (baseline, loaded)
    ]
    if pairs[0] != pairs[1]:
        raise ValueError(
            f"{baseline.path} translates {'-'.join(pairs[0])}, {loaded.path} "
            f"{'-'.join(pairs[1])}; a baseline must translate the same languages"
        )


def _split(settings: EvalConfig, loaded: LoadedModel) -> HeldOut:
    """The held-out part of the corpus that the model was trained on, and of no other."""
    other = "Other text can be scored with eval.source=FILE eval.reference=FILE"
    prepared = corpus.find(loaded.info["corpus"])
    if prepared is None:
        try:
            prepared = corpus.prepare(loaded.config.data, loaded.config.tokenizer)
        except ValueError as error:
            raise ValueError(
                f"cannot open the corpus of {loaded.path}: {error}\n{other}"
            ) from error
    if prepared.fingerprint != loaded.info["corpus_fingerprint"]:
        raise ValueError(
            f"the corpus of {loaded.path} has changed since the training, so that its held-out "
            f"text may have been trained on; put the old files back. {other}"
        )
    split = getattr(prepared, settings.split.value)
    return HeldOut(
        name=settings.split.value,
        sources=list(split["source"]),
        references=list(split["target"]),
        num_leaked=loaded.info["num_leaked"][settings.split.value],
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
