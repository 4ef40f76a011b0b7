"""What a person sees of a training: the terminal, the log file, TensorBoard."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tqdm
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """The last few steps."""

    step: int
    loss: float  # smoothed training loss a target piece
    length_loss: float  # of the length head, a sentence
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float  # target pieces, without padding
    padding_share: float
    epoch: float
    epoch_seconds: float  # how long a whole one takes at this pace


@dataclass(frozen=True, slots=True)
class Validation:
    """Scores on held-out text at a step."""

    step: int
    loss: float  # mean cross-entropy a target piece, without smoothing
    bleu: float | None  # of a fixed sample, greedy search; None when no sentence is translated
    chrf: float | None
    num_leaked: int  # validation sentences that the training text repeated, before cleaning
    seconds: float

    def __str__(self) -> str:
        scores = f"validation at step {self.step}: loss {self.loss:.3f}"
        if self.bleu is not None and self.chrf is not None:
            scores += f", BLEU {self.bleu:.2f}, chrF {self.chrf:.2f}"
        return f"{scores} ({self.num_leaked} leaked before cleaning, {self.seconds:.1f} s)"


class Monitor:
    """Shows a training on the terminal (a bar, or lines where there is none) and in TensorBoard."""

    def __init__(self, folder: Path, *, first_step: int, max_steps: int) -> None:
        # purge_step: what a killed process wrote after its last checkpoint is hidden.
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.max_steps = max_steps
        self.first_step = first_step
        self.start = time.monotonic()
        self.line_every = max(1, max_steps // 20)
        self.next_line = first_step
        self.bar = tqdm.tqdm(
            initial=first_step,
            total=max_steps,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def progress(self, now: Progress) -> None:
        """Show how the training goes."""
        scalars = {
            "train/loss": now.loss,
            "train/length_loss": now.length_loss,
            "train/gradient_norm": now.gradient_norm,
            "train/learning_rate": now.learning_rate,
            "train/tokens_per_second": now.tokens_per_second,
            "train/padding_share": now.padding_share,
            "train/epoch": now.epoch,
        }
        for name, value in scalars.items():
            self.board.add_scalar(name, value, now.step)
        self.bar.set_postfix_str(
            f"loss {now.loss:.3f}, {now.tokens_per_second:,.0f} tokens/s", refresh=False
        )
        self.bar.update(now.step - self.bar.n)
        if self.bar.disable and (now.step >= self.next_line or now.step == self.max_steps):
            self.next_line = now.step + self.line_every
            log.info(
                "step %d of %d, epoch %.1f (%s each): loss %.3f, %s tokens/s, %s left",
                now.step,
                self.max_steps,
                now.epoch,
                clock(now.epoch_seconds),
                now.loss,
                f"{now.tokens_per_second:,.0f}",
                clock(self.seconds_left(now.step)),
            )

    def seconds_left(self, step: int) -> float:
        """An estimate from the pace so far."""
        done = step - self.first_step
        return (time.monotonic() - self.start) / max(1, done) * (self.max_steps - step)

    def validation(self, scores: Validation, *, samples: Sequence[tuple[str, str, str]]) -> None:
        """Show scores and sample translations (source, reference, hypothesis)."""
        log.info("%s", scores)
        self.board.add_scalar("valid/loss", scores.loss, scores.step)
        if scores.bleu is not None and scores.chrf is not None:
            self.board.add_scalar("valid/bleu", scores.bleu, scores.step)
            self.board.add_scalar("valid/chrf", scores.chrf, scores.step)
        paragraphs = [
            f"**source** {source}\n\n**reference** {reference}\n\n**hypothesis** {hypothesis}"
            for source, reference, hypothesis in samples
        ]
        text = "\n\n---\n\n".join(paragraphs)
        self.board.add_text("valid/samples", text, scores.step)

    def attention(
        self, weights: Tensor, *, source: Sequence[str], target: Sequence[str], step: int
    ) -> None:
        """Draw cross-attention weights [T, S] with their pieces."""
        self.board.add_figure(
            "valid/cross_attention", heat_map(weights, source=source, target=target), step
        )

    def close(self) -> None:
        """Write out what is left."""
        self.bar.close()
        self.board.close()


def heat_map(weights: Tensor, *, source: Sequence[str], target: Sequence[str]) -> "Figure":
    """Weights [T, S] as an image: a row for each target piece, a column for each source piece."""
    from matplotlib.figure import Figure  # slow to import, rarely needed

    assert weights.shape == (len(target), len(source))
    figure = Figure(figsize=(2 + 0.3 * len(source), 1.5 + 0.3 * len(target)), layout="tight")
    axes = figure.add_subplot()
    axes.imshow(weights.detach().float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(np.arange(len(source)), [plain(piece) for piece in source], rotation=90)
    axes.set_yticks(np.arange(len(target)), [plain(piece) for piece in target])
    return figure


def plain(piece: str) -> str:
    """A piece as a plot label: a dollar sign would begin a formula."""
    return piece.replace("$", r"\$")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _AboveBar(logging.Handler):
    """Lines on stderr that do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Log lines go to the terminal and, with the time, to a file."""
    root = logging.getLogger("mt")
    terminal, lasting = _AboveBar(), logging.FileHandler(file, encoding="utf-8")
    lasting.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    before, root.propagate = root.propagate, False
    level = root.level
    root.setLevel(logging.INFO)
    for handler in (terminal, lasting):
        root.addHandler(handler)
    try:
        yield
    except Exception as error:  # whoever called shows it; the file has it, too
        lasting.handle(
            root.makeRecord("mt", logging.ERROR, __file__, 0, "%s", (error,), sys.exc_info())
        )
        raise
    finally:
        root.propagate = before
        root.setLevel(level)
        for handler in (terminal, lasting):
            root.removeHandler(handler)
        lasting.close()
