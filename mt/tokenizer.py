"""Text to piece ids and back: SentencePiece, one joint vocabulary; the home of the special ids.

The model sees text as it is (rule ``identity``; Unicode normalization is the corpus's own step),
and byte fallback gives every character a way into the vocabulary. A round trip is exact up to
white space; U+2581, SentencePiece's own mark of a space, comes back as a space.
"""

import io
import logging
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from mt.config import TokenizerConfig

PAD, BOS, EOS, UNK = 0, 1, 2, 3

log = logging.getLogger(__name__)

_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character: no UTF-8 has it
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ufeff]")


def normalize(text: str, *, nfc: bool = True, control: bool = True) -> str:
    """One line of text as the models see it, in training and in use.

    ``nfc``: Unicode normalization form C. ``control``: control characters (and a byte order mark)
    become spaces, and white space of every kind and length becomes one space, none at the ends.
    Half characters always become U+FFFD.
    """
    text = _SURROGATE.sub("\ufffd", text)
    if nfc:
        text = unicodedata.normalize("NFC", text)
    if control:
        text = " ".join(_CONTROL.sub(" ", text).split())
    return text


class Tokenizer:
    """A trained SentencePiece model."""

    def __init__(self, model: bytes) -> None:
        """``model`` is the content of a ``tokenizer.model`` file."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a ``tokenizer.model`` file; ValueError when it is missing or is not one."""
        try:
            model = Path(path).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"there is no tokenizer at {path}") from None
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        try:
            tokenizer = cls(model)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model; it may be damaged") from error
        if len(tokenizer) == 0:  # an empty file is a model without pieces
            raise ValueError(f"{path} is empty; it may be damaged")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes the ``tokenizer.model`` file."""
        Path(path).write_bytes(self._model)

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without BOS and EOS."""
        valid = [text.encode("utf-8", "replace") for text in texts]  # no lone surrogates
        return self._processor.encode(valid, out_type=int)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence of ids; PAD, BOS and EOS are left out."""
        special = (PAD, BOS, EOS)
        rows = [[i for i in row if i not in special] for row in ids]
        return self._processor.decode(rows) if rows else []

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The written form of each id, for plots and for other programs."""
        return [self._processor.id_to_piece(i) for i in ids]


def train_tokenizer(
    sentences: Iterable[str], config: TokenizerConfig, *, seed: int = 1
) -> Tokenizer:
    """Learns a vocabulary from ``sentences``, from a sample of them where there are more than
    ``config.max_sentences``.

    The same sentences, settings and seed give the same model. A vocabulary larger than the text
    has pieces for is lowered, which is logged; one too small for its characters is a ValueError.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(sentences, config.max_sentences, seed=seed)),
            model_writer=model,
            model_type=config.algorithm.value,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            num_threads=2,  # fixed: it shapes the sums, and so the result
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"required_chars. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"tokenizer.vocab_size={config.vocab_size} has no room for the bytes and the"
                f" characters of this text, {found[1]} pieces; raise it, or lower"
                " tokenizer.character_coverage"
            ) from None
        raise ValueError(f"SentencePiece cannot learn from this text: {error}") from error
    tokenizer = Tokenizer(model.getvalue())
    if len(tokenizer) < config.vocab_size:
        log.warning(
            "tokenizer.vocab_size=%d is too large for this text; lowered to %d",
            config.vocab_size,
            len(tokenizer),
        )
    return tokenizer


def _sample(sentences: Iterable[str], size: int, *, seed: int) -> list[str]:
    """At most ``size`` sentences, each with the same chance (reservoir sampling)."""
    generator = random.Random(seed)
    sample: list[str] = []
    for number, sentence in enumerate(sentences):
        if number < size:
            sample.append(sentence)
        elif (place := int(generator.random() * (number + 1))) < size:
            sample[place] = sentence
    return sample
