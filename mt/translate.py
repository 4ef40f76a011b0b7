"""Text to text: normalize, split what is too long, search, and join again, in the order given."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mt.batching import length_batches, pad
from mt.checkpoint import LoadedModel, find_model, load_model
from mt.config import Config, DecodeConfig, Device, Precision
from mt.model import Transformer
from mt.packed import can_pack, for_inference
from mt.runtime import Runtime, resolve
from mt.search import Hypothesis, beam_search
from mt.tokenizer import EOS, PAD, Tokenizer, normalize

_UNSPACED = {"bo", "ja", "km", "lo", "my", "th", "zh"}  # languages written without spaces

# Where a normalized text may be cut, the best places first: at the end of each match. The full
# stops of most scripts need a space after them, those of Chinese and Japanese do not.
_STOP, _CLAUSE, _QUOTE = "[.!?…؟۔։።।॥။។]", "[,;:،؛–—]", r"""["'”’»›)\]}]"""
_TITLE = r"(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!\b[A-Z][a-z]{2}\.)"  # not after J., Mr., Mrs.
_CUTS = [
    re.compile(
        rf"(?:(?<={_STOP})|(?<={_STOP}{_QUOTE})|(?<={_STOP}{_QUOTE}{_QUOTE})){_TITLE}"
        " (?![a-zß-öø-ÿа-я])|[。！？｡]+[」』）】〉》”’]* ?"
    ),
    re.compile(rf"(?:(?<={_CLAUSE})|(?<={_CLAUSE}{_QUOTE})) |[、，；：]+[」』）】〉》”’]* ?"),
    re.compile(" "),
]


def primary_language(code: str) -> str:
    """zh of zh_TW, zh-Hans and zh."""
    return re.split("[-_]", code)[0].lower()


def writes_spaces(code: str) -> bool:
    """Whether a language separates its words by spaces."""
    return primary_language(code) not in _UNSPACED


@dataclass(frozen=True, slots=True)
class Translation:
    """An output text and its score: sum of log probabilities / length^alpha."""

    text: str
    score: float


def length_bounds(source_lengths: Tensor, log_ratios: Tensor | None, *, max_length: int) -> Tensor:
    """Largest output length of each sentence: min(max_length, ⌈1.5 · predicted⌉ + 10).

    ``source_lengths`` [B] and the result [B] count pieces with the end of sentence;
    ``log_ratios`` [B] are the predicted log(target length / source length), None without a
    length head: then only ``max_length`` bounds.
    """
    if log_ratios is None:
        return torch.full_like(source_lengths, max_length)
    predicted = source_lengths * log_ratios.float().exp()
    bounds = (1.5 * predicted).ceil() + 10
    return bounds.nan_to_num(nan=max_length).clamp(max=max_length).long()


class Translator:
    """Translates with a trained model."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: Config,
        runtime: Runtime,
        *,
        decode: DecodeConfig,
        long_source: int | None = None,
    ) -> None:
        """``model`` is on ``runtime.device`` and in eval mode; ``config`` is that of its training.

        ``long_source``: a length in pieces, EOS included, that few sources of the training exceed;
        by default half of the longest that was allowed.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.device = runtime.device
        self.decode = decode
        # Pieces without the end of sentence. A single sentence is translated as it is up to
        # the longest source of the training; several in one line only up to a usual length,
        # because a model that has seen few so long tends to drop what comes late in them.
        self.max_source = max(1, config.train.max_length - 1)
        usual = long_source or config.train.max_length // 2
        self.usual_source = max(1, min(usual - 1, self.max_source))
        self.separator = " " if writes_spaces(config.data.target_lang) else ""
        self.nfc = config.data.clean.nfc

    @classmethod
    def of(
        cls, loaded: LoadedModel, runtime: Runtime, *, decode: DecodeConfig | None = None
    ) -> "Translator":
        """A translator with a loaded model, by default with its own decode options."""
        return cls(
            for_inference(loaded.model, runtime),
            loaded.tokenizer,
            loaded.config,
            runtime,
            decode=decode or loaded.config.decode,
            long_source=loaded.info.get("long_source"),
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        decode: DecodeConfig | None = None,
        device: Device = Device.auto,
        precision: Precision = Precision.fp32,
        num_threads: int | None = None,
    ) -> "Translator":
        """A translator from a model directory or a run, by default with its own decode options.

        ``ValueError`` where there is no model.
        """
        runtime = resolve(device=device, precision=precision, num_threads=num_threads)
        dtype = torch.float32 if can_pack(runtime) else runtime.dtype
        loaded = load_model(find_model(path), device=runtime.device, dtype=dtype)
        return cls.of(loaded, runtime, decode=decode)

    def translate(self, texts: Sequence[str], *, n_best: int = 1) -> list[list[Translation]]:
        """The best translations of each text, best first; of a blank text the blank text.

        There may be fewer than ``n_best`` (at most the beam size). Each is a single line.
        """
        parts = [self._parts(text) for text in texts]
        found = iter(self._search([ids for text in parts for ids in text], n_best=n_best))
        return [self._join([next(found) for _ in text]) for text in parts]

    def _parts(self, text: str) -> list[list[int]]:
        """The ids of what is translated at a time: the whole text, or its parts if it is long."""
        text = normalize(text, nfc=self.nfc)
        if not text:
            return []
        (ids,) = self.tokenizer.encode([text])
        if len(ids) <= self.usual_source:
            return [ids]
        return self.tokenizer.encode(self._split(text))

    def _split(self, text: str, *, level: int = 0) -> list[str]:
        """Cut a text at its sentences, those still too long at their clauses, and so on.

        Neighbours go together again as far as they stay within the usual length.
        """
        if level < len(_CUTS):
            cuts = [match.end() for match in _CUTS[level].finditer(text)]
        else:  # a very long word
            cuts = [len(text) // 2]
        units = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)]) if i < j]
        parts = []
        for unit, ids in zip(units, self.tokenizer.encode(units), strict=True):
            if len(ids) <= self.max_source or len(unit) == 1:
                parts.append(unit)
            else:
                parts.extend(self._split(unit, level=min(level + 1, len(_CUTS))))
        return self._pack(parts)

    def _pack(self, units: list[str]) -> list[str]:
        """Put neighbours together up to the usual length."""
        packed: list[str] = []
        room = 0
        for unit, ids in zip(units, self.tokenizer.encode(units), strict=True):
            if packed and len(ids) <= room:
                packed[-1] += unit
                room -= len(ids)
            else:
                packed.append(unit)
                room = self.usual_source - len(ids)
        return packed

    def _search(self, sentences: list[list[int]], *, n_best: int) -> list[list[Hypothesis]]:
        """Search for all sentences of ids, those of similar length together."""
        found: list[list[Hypothesis]] = [[] for _ in sentences]
        max_tokens = max(1, self.decode.batch_tokens // self.decode.beam_size)
        lengths = [len(ids) + 1 for ids in sentences]  # with EOS
        for batch in length_batches(lengths, max_tokens=max_tokens):
            hypotheses = self._search_batch([sentences[index] for index in batch], n_best=n_best)
            for index, best in zip(batch, hypotheses, strict=True):
                found[index] = best
        return found

    @torch.inference_mode()
    def _search_batch(self, sentences: list[list[int]], *, n_best: int) -> list[list[Hypothesis]]:
        source = pad([[*ids, EOS] for ids in sentences]).to(self.device)  # [B, S]
        mask = source != PAD
        memory = self.model.encode(source, mask)
        log_ratios = None
        if self.model.length_head is not None:
            log_ratios = self.model.log_length_ratio(memory, mask)
        return beam_search(
            self.model.start(memory, mask),
            max_lengths=length_bounds(mask.sum(1), log_ratios, max_length=self.decode.max_length),
            beam_size=self.decode.beam_size,
            length_penalty=self.decode.length_penalty,
            n_best=n_best,
        )

    def _join(self, parts: list[list[Hypothesis]]) -> list[Translation]:
        """One text's translations from those of its parts: the best together, and so on."""
        if not parts:
            return [Translation("", 0.0)]
        joined = []
        for rank in range(max(map(len, parts))):
            chosen = [part[min(rank, len(part) - 1)] for part in parts]
            text = self.separator.join(self.tokenizer.decode([h.ids for h in chosen]))
            joined.append(Translation(normalize(text), self._joint_score(chosen)))
        return sorted(joined, key=lambda translation: translation.score, reverse=True)

    def _joint_score(self, hypotheses: list[Hypothesis]) -> float:
        """The score as if all were one hypothesis."""
        alpha = self.decode.length_penalty
        lengths = [len(h.ids) + 1 for h in hypotheses]
        log_prob = sum(h.score * n**alpha for h, n in zip(hypotheses, lengths, strict=True))
        return log_prob / sum(lengths) ** alpha
