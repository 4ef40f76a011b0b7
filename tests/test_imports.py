"""Who may know whom: the rooms of ``mt/`` form layers, and only a few of them know Hydra."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What a room may import of mt, besides config. A room that is not here does not exist yet.
LAYERS: dict[str, set[str]] = {
    "config": set(),
    "compose": set(),
    "attention": set(),
    "loss": set(),
    "ranks": set(),
    "runtime": {"ranks"},
    "tokenizer": set(),
    "optim": set(),
    "monitor": set(),
    "bible": set(),
    "digests": set(),
    "search": {"tokenizer"},  # the special ids
    "batching": {"tokenizer"},  # the special ids
    "sources": {"bible", "digests"},
    "cleaning": {"tokenizer"},
    "corpus": {"cleaning", "digests", "sources", "tokenizer"},
    "model": {"attention"},
    "packed": {"model", "runtime"},
    "checkpoint": {"model", "tokenizer"},
    "runs": set(),
    "translate": {
        "batching", "checkpoint", "model", "packed", "runtime", "search", "tokenizer",
    },
    "evaluate": {
        "batching", "checkpoint", "corpus", "loss", "model", "runtime", "tokenizer", "translate",
    },
    "trainer": {
        "batching", "checkpoint", "corpus", "loss", "model", "optim", "ranks", "runtime",
        "tokenizer",
    },
    "validate": {
        "batching", "corpus", "evaluate", "model", "monitor", "runtime", "translate",
    },
    "signals": {"ranks"},
    "preflight": {"batching", "corpus", "runtime", "trainer"},
    "budget": {"corpus", "preflight", "ranks", "runs", "runtime", "trainer"},
    "train": {
        "budget", "checkpoint", "corpus", "evaluate", "monitor", "ranks", "runs", "runtime",
        "signals", "trainer", "validate",
    },
}  # fmt: skip


# Only these know how a config is put together.
CONFIG_TOOLS: dict[str, set[str]] = {"config": {"omegaconf"}, "compose": {"hydra", "omegaconf"}}


def imports(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(names: set[str]) -> set[str]:
    """The rooms of mt among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("mt.")}


def problems(package: Path) -> list[str]:
    """Every import in the package that the table does not allow."""
    found = []
    for path in sorted(package.glob("**/*.py")):
        room, names = path.stem, imports(path)
        if room == "__init__":
            allowed: set[str] = set()
        elif room not in LAYERS or path.parent != package:
            found.append(f"{path.relative_to(package)} has no place in the table")
            continue
        else:
            allowed = LAYERS[room] | {"config"} - {room}
        found += [f"{room} imports {other}" for other in sorted(rooms(names) - allowed)]
        tops = {name.split(".")[0] for name in names}
        strange = {"scripts", "command", "hydra", "omegaconf"} - CONFIG_TOOLS.get(room, set())
        found += [f"{room} imports {other}" for other in sorted(tops & strange)]
    return found


def test_every_import_is_in_the_table() -> None:
    assert problems(ROOT / "mt") == []


def test_the_table_has_no_cycle() -> None:
    left = dict(LAYERS)
    while ready := [room for room, known in left.items() if not known & left.keys()]:
        for room in ready:
            del left[room]
    assert left == {}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("attention.py", "from mt.model import Transformer"),
        ("attention.py", "from mt import model"),
        ("attention.py", "import mt.model"),
        ("model.py", "def build():\n    from mt.checkpoint import load_model"),
        ("train.py", "import hydra"),
        ("train.py", "from omegaconf import OmegaConf"),
        ("train.py", "from scripts import translate"),
        ("other.py", "import math"),
        ("more/model.py", "import math"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert len(problems(tmp_path)) == 1
