"""Prepare a corpus without training: scripts/prepare.py [data=choice] [data.setting=value ...]."""

import hydra
from omegaconf import DictConfig

from command import check_command_line, user_errors
from mt.compose import to_config


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(node: DictConfig) -> None:
    with user_errors():
        config = to_config(node)
        from mt.cleaning import table  # only now: a mistyped setting is reported without the wait
        from mt.corpus import prepare

        corpus = prepare(config.data, config.tokenizer)
        print(f"{corpus.path}\n{table(corpus.report)}")


if __name__ == "__main__":
    check_command_line(primary="train")
    main()
