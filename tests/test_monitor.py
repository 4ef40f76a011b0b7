"""What a person sees: times, bars, logs and heat maps."""

import logging
from pathlib import Path

import pytest
import torch

from mt.monitor import Monitor, Progress, Validation, clock, heat_map, logged_to


def progress(step: int) -> Progress:
    return Progress(
        step=step,
        loss=2.5,
        length_loss=0.1,
        gradient_norm=1.0,
        learning_rate=1e-3,
        tokens_per_second=1234.0,
        padding_share=0.05,
        epoch=0.5,
        epoch_seconds=60.0,
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (36000, "10:00:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_validation_in_words() -> None:
    scores = Validation(step=5, loss=1.5, bleu=20.0, chrf=40.0, num_leaked=3, seconds=2)
    assert "step 5" in str(scores)
    assert "BLEU 20.00, chrF 40.00" in str(scores)
    assert "BLEU" not in str(
        Validation(step=5, loss=1.5, bleu=None, chrf=None, num_leaked=0, seconds=2)
    )


def test_without_a_terminal_there_are_few_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = Monitor(tmp_path, first_step=0, max_steps=1000)
    with caplog.at_level(logging.INFO, logger="mt"):
        for step in range(1, 1001):
            monitor.progress(progress(step))
    monitor.close()
    lines = [record.getMessage() for record in caplog.records]
    assert 10 <= len(lines) <= 25
    assert all("loss 2.500" in line and "1,234 tokens/s" in line for line in lines)
    assert "step 1000 of 1000" in lines[-1]


def test_the_time_left_shrinks_with_the_steps_left(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, first_step=10, max_steps=110)
    monitor.start -= 50  # as if ten steps had taken 50 seconds
    assert monitor.seconds_left(20) == pytest.approx(450, rel=0.05)
    assert monitor.seconds_left(110) == 0
    monitor.close()


def test_lines_go_to_the_terminal_and_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.log"
    log = logging.getLogger("mt.something")
    for line in ("first – ½", "second"):
        with logged_to(file):
            log.info(line)
            log.debug("not this")
        log.info("nor this")
    written = file.read_text(encoding="utf-8")
    shown = capsys.readouterr()
    assert shown.out == ""
    for text in (written, shown.err):
        lines = text.splitlines()
        assert len(lines) == 2
        assert lines[0].endswith("first – ½")
        assert lines[1].endswith("second")
    assert not logging.getLogger("mt").handlers


def test_a_heat_map_has_the_pieces_as_labels(tmp_path: Path) -> None:
    source, target = ["▁the", "▁$5", "</s>"], ["▁д", "$x_$", "^", "</s>"]
    weights = torch.rand(4, 3, dtype=torch.bfloat16)
    figure = heat_map(weights, source=source, target=target)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["▁the", r"▁\$5", "</s>"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["▁д", r"\$x_\$", "^", "</s>"]
    assert axes.images[0].get_array().shape == (4, 3)
    figure.savefig(tmp_path / "map.png")  # a piece that reads as a formula would raise here
    assert (tmp_path / "map.png").stat().st_size > 0
