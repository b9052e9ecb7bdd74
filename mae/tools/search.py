"""A search by Optuna: TPE, pruning, and a storage that survives a kill.

python -m mae.search runs/search --trials 12 task=finetune init=auto 'optimizer.base_lr=tag(log,interval(1e-3,1e-1))' \\
    'optimizer.layer_decay=interval(0.5,1.0)'

What is searched is written as Hydra writes sweeps: choice(a,b), range(1,9), interval(0.5,1), tag(log,interval(1,9)).
Each trial is a run in a folder of the search's directory. The same command goes on after a kill, and started several
times (`srun -n 4 python -m mae.search ...`) it works in parallel on the same trials. Needs the extra `search`.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from mae.config.check import check_config, resolve
from mae.config.compose import chosen_groups, composed
from mae.config.from_run import inherited, with_groups
from mae.config.overrides import assignment, key_of
from mae.errors import UserError
from mae.launch.errors import explain
from mae.launch.launch import AUTO, launch
from mae.launch.pipeline import own_names, pretraining
from mae.report.members import SEARCHED, lower_is_better
from mae.report.sweep import finish_sweep
from mae.runs import files
from mae.runs.locks import file_lock
from mae.tools import search_trial

log = logging.getLogger(__name__)

STORAGE = "search.db"
WAIT_S = 1.0  # between two looks at whether other workers, or what a killed one left running, are done


def spaces(overrides: list[str]) -> tuple[dict[str, Override], list[str]]:
    """The keys to search with their ranges, and the overrides that are the same in all trials.

    Raises UserError where nothing is searched.
    """
    searched, fixed = {}, []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            searched[override.get_key_element()] = override
        else:
            fixed.append(override.input_line)
    if not searched:
        raise UserError(
            "Nothing is searched: give a key a range, as in 'optimizer.base_lr=tag(log, interval(1e-4, 1e-1))' or "
            "optimizer.layer_decay=0.65,0.75."
        )
    return searched, [one for one in fixed if one is not None]


def suggested(trial: Any, key: str, override: Override) -> str:
    """The trial's value of a key, as it is written on a command line."""
    space = override.value()
    if isinstance(space, IntervalSweep):
        assert space.start is not None and space.end is not None
        if "log" in space.tags and space.start <= 0:
            raise UserError(f"{key} is searched on a logarithmic scale, which begins above 0, got {space.start}.")
        integer = isinstance(space.start, int) and isinstance(space.end, int)
        suggest = trial.suggest_int if integer else trial.suggest_float
        return f"{suggest(key, space.start, space.end, log='log' in space.tags):.6g}"
    if isinstance(space, RangeSweep):
        whole = isinstance(space.start, int) and isinstance(space.step, int)
        values = [v for v in space.range()]
        return str(trial.suggest_categorical(key, [int(v) if whole else float(v) for v in values]))
    assert isinstance(space, ChoiceSweep)
    return str(trial.suggest_categorical(key, [text for text in override.sweep_string_iterator()]))


def open_study(directory: Path, metric: str) -> Any:
    """The study of a directory, new or gone on with. Raises UserError without optuna."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("A search needs the package optuna: pip install 'mae-experiments[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "minimize" if lower_is_better(metric) else "maximize"
    with held(directory):  # two that create its tables at once fail
        return optuna.create_study(
            study_name="search",
            storage=f"sqlite:///{(directory / STORAGE).absolute()}",
            direction=direction,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
            load_if_exists=True,
        )


def held(directory: Path) -> BaseFileLock:
    """What all workers of a search share is touched by one at a time."""
    return file_lock(directory / ".lock")


def next_trial(study: Any, directory: Path, trials: int, seed: int) -> tuple[Any, Any] | None:
    """The next trial and the lock that says who works on it: first one whose worker died, else a new one.

    None where all are finished; (None, None) where others still work on the last ones.
    """
    import optuna

    with held(directory):
        known = study.get_trials(deepcopy=False)
        for one in known:
            if one.state == optuna.trial.TrialState.RUNNING:
                lock = search_trial.try_lock(search_trial.folder(directory, one.number))
                if lock is not None:
                    log.info("trial %d was left unfinished: it goes on", one.number)
                    return optuna.trial.Trial(study, one._trial_id), lock
        if len(known) >= trials:
            return None if all(one.state.is_finished() for one in known) else (None, None)
        # seeded by how many there are, so that a search that goes on does not draw the same again
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(known), n_startup_trials=5)
        trial = study.ask()
        return trial, search_trial.try_lock(search_trial.folder(directory, trial.number))


def search(directory: Path, trials: int, metric: str, seed: int, prune: bool, overrides: list[str]) -> str:
    """Runs trials until there are `trials` of them; returns what is to be said at the end."""
    searched, fixed = spaces(overrides)
    given = with_groups([*fixed, *first_values(searched)])
    first = check_config(resolve(inherited(composed(given), given)))
    if first.init == AUTO:
        parent = assignment("init", parent_of(first, chosen_groups(given)))
        fixed = [*(override for override in fixed if key_of(override) != "init"), parent]
    study = open_study(directory, metric)
    files.write_text(directory / SEARCHED, "".join(f"- {key}\n" for key in searched))
    while (found := next_trial(study, directory, trials, seed)) is not None:
        trial, lock = found
        if trial is None:
            time.sleep(WAIT_S)
            continue
        with lock:
            values = [f"{key}={suggested(trial, key, space)}" for key, space in searched.items()]
            search_trial.run(study, trial, directory, [*fixed, *values], metric, prune)
    with held(directory):
        return finish_sweep(directory)


def first_values(searched: dict[str, Override]) -> Iterator[str]:
    """One value of each searched key, to check the rest of the config with before anything runs."""
    for key, override in searched.items():
        space = override.value()
        if isinstance(space, IntervalSweep | RangeSweep):
            yield f"{key}={space.start}"
        else:
            yield f"{key}={next(iter(override.sweep_string_iterator()))}"


def parent_of(cfg: Any, choices: dict[str, str]) -> str:
    """The pretrained run that all trials start from with init=auto, made where it is missing."""
    parent = pretraining(cfg, choices)
    with file_lock(Path(f"{parent.output_dir}.lock")):
        if not Path(parent.output_dir, "summary.json").exists() and launch(
            parent, ["task=pretrain", *own_names(cfg, choices)]
        ):
            raise UserError(f"init=auto: pre-training in {parent.output_dir} was not finished.")
    return parent.output_dir


@contextmanager
def plain_errors() -> Iterator[list[int]]:
    """Says a user's error in a sentence; the exit code is left in the list."""
    code = [0]
    try:
        yield code
    except (ValueError, HydraException) as error:
        sys.stderr.write(f"{explain(error)}\n")
        code[0] = 1
    except KeyboardInterrupt:
        code[0] = 130


def main(arguments: list[str] | None = None) -> int:
    """`python -m mae.search`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mae.search", description="A search by Optuna (TPE, pruning).")
    parser.add_argument("directory", type=Path, help="where the search lies; the same one goes on")
    parser.add_argument("overrides", nargs="+", help="as for run.py; ranges are searched")
    parser.add_argument("--trials", type=int, default=20, help="how many there are at the end, over all starts")
    parser.add_argument("--metric", default="top1", help="of summary.json: top1, val_loss (default: top1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--no-prune", action="store_true", help="let every trial come to its end")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    with plain_errors() as code:
        prune = not given.no_prune
        sys.stdout.write(search(given.directory, given.trials, given.metric, given.seed, prune, given.overrides))
    return code[0]
