"""Masked autoencoders: composes a config from conf/ and the command line, checks it, and launches it.

python run.py                    pre-trains a small model on embedded data
python run.py --help             the groups to choose from
"""

import os
import sys

EXPLAIN = "HYDRA_FULL_ERROR" not in os.environ
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors to us, who say them in one sentence

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from mae import config, launch  # noqa: E402


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> int:
    overrides = list(HydraConfig.get().overrides.task)
    if cfg.resume:
        cfg = launch.resumed(cfg, overrides)
    checked = config.check(config.resolve(cfg))
    if checked.dry_run:
        from mae import dry_run

        print(dry_run.report(checked))
        return 0
    return launch.launch(checked, overrides)


class Failed(Exception):
    """A member of a sweep, or the run, ended with an exit code that is not 0. What was wrong has been said."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def explain(error: BaseException) -> int:
    """Says an error in plain words on stderr; returns the exit code. A traceback comes with HYDRA_FULL_ERROR=1."""
    if isinstance(error, Failed):
        return error.code
    sys.stderr.write(f"{config.in_plain_words(error)}\n")
    return 1


if __name__ == "__main__":
    main()
