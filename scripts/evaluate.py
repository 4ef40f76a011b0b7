"""Score a model: scripts/evaluate.py [eval.model=runs/last] [eval.setting=value ...]."""

import hydra
from omegaconf import DictConfig

from command import check_command_line, user_errors
from mt.compose import to_config


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(node: DictConfig) -> None:
    with user_errors():
        config = to_config(node)
        from mt.evaluate import evaluate, table  # only now: a mistyped setting needs no wait

        print(table(evaluate(config)))


if __name__ == "__main__":
    check_command_line(primary="evaluate")
    main()
