"""Which model, on which text: settings on the command line, as in training."""

from collections.abc import Sequence

from command import check_overrides
from mt.compose import compose
from mt.config import Config

CORPUS = [
    "data=files",
    "data.name=multi30k",
    "data.train=data/multi30k/train",
    "data.valid=data/multi30k/val",
    "data.test=data/multi30k/test_2016_flickr",
]


def compose_subject(usual: Sequence[str], overrides: Sequence[str]) -> Config:
    """The config that the usual settings make, where the overrides name nothing else.

    Raises: ValueError with all that is wrong with them.
    """
    names_a_corpus = any(text.startswith(("data=", "experiment=")) for text in overrides)
    corpus = [] if names_a_corpus else CORPUS
    chosen = {text.partition("=")[0]: text for text in [*corpus, *usual, *overrides]}
    check_overrides(list(chosen.values()), primary="train")
    config: Config = compose(list(chosen.values()))
    return config
