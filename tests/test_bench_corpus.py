"""The benchmark of large corpora, on small ones."""

from pathlib import Path

import pytest

from benchmarks.corpus import CHUNK, measure_corpus, write_corpus


def test_text_is_the_same_every_time_and_like_text(tmp_path: Path) -> None:
    for name, number in (("one", CHUNK + 100), ("two", CHUNK)):
        (tmp_path / name).mkdir()
        write_corpus(number, tmp_path / name)
    for side in ("en", "de"):
        lines, same = (
            (tmp_path / name / f"train.{side}").read_text(encoding="utf-8").splitlines()
            for name in ("one", "two")
        )
        assert len(lines) == CHUNK + 100
        assert lines[:CHUNK] == same
        words = " ".join(lines).lower().split()
        assert 15 < len(words) / len(lines) < 30
        assert 3 < sum(map(len, words)) / len(words) < 10
        assert len(set(lines)) > 0.99 * len(lines)


@pytest.mark.slow
def test_everything_is_measured(tmp_path: Path) -> None:
    result = measure_corpus(3000, tmp_path)
    assert all(value > 0 for value in result.values())
    assert result["first_step_seconds"] > result["plan_seconds"]
