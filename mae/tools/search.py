"""A search by Optuna: TPE, pruning, and a storage that survives a kill.

python -m mae.search runs/search --trials 12 task=finetune init=auto 'optimizer.base_lr=tag(log,interval(1e-3,1e-1))' \\
    'optimizer.layer_decay=interval(0.5,1.0)'

Searched ranges are written as Hydra writes sweeps: choice(a,b), range(1,9), interval(0.5,1), tag(log,interval(1,9)).
Each trial is a run in a folder of the search's directory. The same command resumes it after a kill. Started several
times (`srun -n 4 python -m mae.search ...`), it works in parallel on the same trials. `--first 'KEY=VALUE KEY=VALUE'`
begins with values that are known to be good. Needs the extra `search`.
"""

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import BaseFileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig

from mae.config.check import check_config, resolve, with_values
from mae.config.compose import chosen_groups, composed
from mae.config.from_run import AUTO, stage_command, with_groups, with_run_values
from mae.config.overrides import assignment, key_of, parsed, written_value
from mae.config.unused import is_used, refuse_unused
from mae.config.values import near
from mae.errors import UserError
from mae.launch.errors import explain
from mae.launch.launch import launch
from mae.launch.pipeline import pretraining
from mae.program import usage_name
from mae.report.members import SEARCHED, changes_loss, lower_is_better
from mae.report.sweep import finish_sweep
from mae.runs.files import write_text
from mae.runs.locks import file_lock
from mae.runs.summary import is_finished
from mae.tasks.registry import TASKS, VAL_LOSS
from mae.tools import search_trial
from mae.tools.search_trial import SearchSettings

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

log = logging.getLogger(__name__)

STORAGE = "search.db"
WAIT_S = 1.0  # between two checks whether the trials of other workers are finished


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
    return searched, [line for line in fixed if line is not None]


def suggested(trial: "Trial", key: str, override: Override) -> str:
    """The trial's value of a key, as it is written on a command line."""
    space = override.value()
    if not isinstance(space, IntervalSweep):
        return str(trial.suggest_categorical(key, choices(override)))
    low, high, logarithmic = space.start, space.end, "log" in space.tags
    assert low is not None and high is not None
    if logarithmic and low <= 0:
        raise UserError(f"{key} is searched on a logarithmic scale, which starts above 0, got {low}.")
    if isinstance(low, int) and isinstance(high, int):
        return str(trial.suggest_int(key, low, high, log=logarithmic))
    return f"{trial.suggest_float(key, low, high, log=logarithmic):.6g}"


def choices(override: Override) -> Sequence[str | int | float]:
    """The values of a searched key that is no interval: the numbers of a range, or the texts of a choice."""
    space = override.value()
    if isinstance(space, RangeSweep):
        whole = isinstance(space.start, int) and isinstance(space.step, int)
        return [int(value) if whole else float(value) for value in space.range()]
    assert isinstance(space, ChoiceSweep)
    return list(override.sweep_string_iterator())


def first_trial(text: str, searched: Mapping[str, Override]) -> dict[str, str | int | float]:
    """The values that `--first` names, as Optuna has them; it chooses those of the other keys.

    Raises UserError for a key that is not searched, and for a value outside its range.
    """
    values = {}
    for word in shlex.split(text):
        override, key = parsed(word), key_of(word)
        if override is None or key not in searched:
            raise UserError(f"--first names {key}, which is not searched.{near(key, searched)}")
        space = searched[key].value()
        value = written_value(word) if isinstance(space, ChoiceSweep) else override.value()
        if not (_lies_in(space, value) if isinstance(space, IntervalSweep) else value in choices(searched[key])):
            raise UserError(f"--first names {word}, which the search cannot choose: {searched[key].input_line}.")
        values[key] = value
    return values


def _lies_in(space: IntervalSweep, value: object) -> bool:
    """Whether a value is a number of an interval; of one of whole numbers, a whole number."""
    assert space.start is not None and space.end is not None
    numbers = int if isinstance(space.start, int) and isinstance(space.end, int) else int | float
    return isinstance(value, numbers) and not isinstance(value, bool) and space.start <= value <= space.end


def open_study(directory: Path, metric: str) -> "Study":
    """The study of a directory, new or resumed. Raises UserError without optuna."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("A search needs the package optuna: pip install 'mae-experiments[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "minimize" if lower_is_better(metric) else "maximize"
    with search_lock(directory):  # two that create its tables at once fail
        study = optuna.create_study(
            study_name="search",
            storage=f"sqlite:///{(directory / STORAGE).absolute()}",
            direction=direction,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
            load_if_exists=True,
        )
        known = study.user_attrs.get("metric", metric)  # a search of an earlier version has noted none
        if known != metric:
            raise UserError(f"{directory} is a search by {known}, not {metric}: name another directory.")
        study.set_user_attr("metric", metric)
        return study


def search_lock(directory: Path) -> BaseFileLock:
    """The lock on what all workers of a search share."""
    return file_lock(directory / ".lock")


def next_trial(
    study: "Study", directory: Path, settings: SearchSettings, first: Sequence[Mapping[str, str | int | float]] = ()
) -> tuple["Trial", BaseFileLock] | None:
    """The next trial and its acquired lock: one whose worker died, else a new one with the values of `first` if any.

    None where `settings.trials` exist, and others work on those that are not finished.
    """
    import optuna

    with search_lock(directory):
        waiting = optuna.trial.TrialState.WAITING  # a worker was killed between the next two calls
        known = [trial for trial in study.get_trials(deepcopy=False) if trial.state != waiting]
        for trial in known:
            if trial.state == optuna.trial.TrialState.RUNNING:
                lock = search_trial.try_lock(search_trial.folder(directory, trial.number))
                if lock is not None:
                    log.info("trial %d was left unfinished: it resumes", trial.number)
                    return optuna.trial.Trial(study, trial._trial_id), lock
        if len(known) >= settings.trials:
            return None
        # seeded by the number of trials, so that a search that is resumed does not suggest the same again
        study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(known), n_startup_trials=5)
        if len(known) < len(first):
            study.enqueue_trial(dict(first[len(known)]), skip_if_exists=True)
        trial = study.ask()
        lock = search_trial.try_lock(search_trial.folder(directory, trial.number))
        assert lock is not None
        return trial, lock


def search(directory: Path, settings: SearchSettings, overrides: list[str]) -> str:
    """Runs trials until there are as many as the settings say; returns the result as text."""
    searched, fixed = spaces(overrides)
    first = [first_trial(text, searched) for text in settings.first]
    example = with_groups([*fixed, *example_values(searched)])
    cfg = check_config(resolve(with_run_values(composed(example), example)))
    # one pre-training of init=auto serves all trials
    refuse_unused(with_values(cfg, init=None), example_values(searched))
    settings = replace(settings, metric=settings.metric or usual_metric(cfg))
    if cfg.init == AUTO:
        parent = assignment("init", pretrained_parent(cfg, fixed))
        # what the task does not use was of the pre-training
        fixed = [word for word in fixed if key_of(word) != "init" and is_used(cfg.task.name, word)] + [parent]
    else:
        refuse_unused(cfg, fixed)
    study = open_study(directory, settings.metric)
    if settings.metric == VAL_LOSS.key and (keys := [key for key in searched if changes_loss(key)]):
        log.warning("the search is by val_loss, which %s itself changes: losses do not compare", " and ".join(keys))
    write_text(directory / SEARCHED, "".join(f"- {key}\n" for key in searched))
    while True:
        if following := next_trial(study, directory, settings, first):
            trial, lock = following
            with lock:
                values = [f"{key}={suggested(trial, key, space)}" for key, space in searched.items()]
                search_trial.run_trial(study, trial, directory, [*fixed, *values], settings)
        elif all(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
            break
        else:
            time.sleep(WAIT_S)
    with search_lock(directory):
        return finish_sweep(directory)


def usual_metric(cfg: DictConfig) -> str:
    """The result that a task is for; of a pipeline, that of its last stage which has one. Raises UserError."""
    tasks = cfg.task.stages if cfg.task.name == "pipeline" else [cfg.task.name]
    metrics = [metric.key for metric in (TASKS[task].metric for task in tasks) if metric is not None]
    if not metrics:
        raise UserError(f"task={cfg.task.name} has no result to search by: name a number of its summary, as --metric.")
    return metrics[-1]


def example_values(searched: dict[str, Override]) -> Iterator[str]:
    """One value of each searched key, to check the rest of the config with before anything runs."""
    for key, override in searched.items():
        space = override.value()
        if isinstance(space, IntervalSweep | RangeSweep):
            yield f"{key}={space.start}"
        else:
            yield f"{key}={next(iter(override.sweep_string_iterator()))}"


def pretrained_parent(cfg: DictConfig, fixed: list[str]) -> str:
    """The pre-trained run that all trials start from with init=auto; it is run where it is not finished."""
    parent = pretraining(cfg, chosen_groups(fixed))
    run = Path(parent.output_dir)
    with file_lock(Path(f"{run}.lock")):
        if not is_finished(run) and launch(parent, stage_command("pretrain", cfg, fixed, [])):
            raise UserError(f"init=auto: pre-training in {run} was not finished.")
    return parent.output_dir


def main(arguments: list[str] | None = None) -> int:
    """`python -m mae.search`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=usage_name("search", "search"), description="A search by Optuna (TPE, pruning)."
    )
    parser.add_argument("directory", type=Path, help="the search's directory; the same one resumes it")
    parser.add_argument("overrides", nargs="+", help="as for run.py; ranges are searched")
    parser.add_argument("--trials", type=int, default=20, help="number of trials at the end, over all starts")
    parser.add_argument("--metric", default="", help="of summary.json: top1, val_loss (default: the task's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--first", action="append", default=[], metavar="'KEY=VALUE ...'", help="values to try first")
    parser.add_argument("--no-prune", action="store_true", help="run every trial to its end")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    settings = SearchSettings(args.trials, args.metric, args.seed, prune=not args.no_prune, first=tuple(args.first))
    try:
        sys.stdout.write(search(args.directory, settings, args.overrides))
    except (ValueError, HydraException) as error:
        sys.stderr.write(f"{explain(error)}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
