"""The tracker for Weights & Biases. Never fatal: an error of the service is a warning.

What could not be sent lies in the run's directory, for `wandb sync`.
"""

import logging
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from mae.runs.checkpoints import BEST, checkpoints_of
from mae.runs.files import write_text
from mae.runs.layout import CHECKPOINTS, CLASSES, CONFIG
from mae.tasks.registry import METRICS
from mae.tracking.base import NonFatal, Tracker, step_of

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

log = logging.getLogger(__name__)

AGENT = "WANDB_SWEEP_ID"  # set by `wandb agent`, which then gives the run its id
ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
START_S = 30.0  # seconds that a run's start waits for the service, before it is recorded offline
CALL_S = 10.0  # that a single call, such as an alert, may take


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """The settings of W&B. conf/wandb/off.yaml explains each and holds its default."""

    mode: Literal["online", "offline", "off"]
    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    notes: str | None
    tags: list[str]
    artifacts: bool
    alerts: bool
    timeout_s: Annotated[float, "(0, inf)"]


class WandB(Tracker):
    """One W&B run of a run's directory, however often it is started again."""

    def __init__(self, run: Path, config: Mapping[str, object], settings: WandbSettings):
        self.run, self.settings = run, settings
        self.agent = AGENT in os.environ
        self.wandb = start_run(run, config, settings)
        define = self.wandb.define_metric
        define("images_seen", hidden=True)
        define("epoch", hidden=True)
        define("*", step_metric="images_seen")
        define("loss", step_metric="images_seen", summary="min,max,last")
        define("val/*", step_metric="images_seen", summary="min,max,last")

    def log(self, metrics: Mapping[str, object]) -> None:
        self._log({key: value for key, value in metrics.items() if value is not None}, step_of(metrics))

    def _log(self, values: dict[str, object], step: int) -> None:
        # the stages of a pipeline share an agent's run and each counts from 0: W&B then counts by itself
        self.wandb.log(values, step=None if self.agent else step)

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        import wandb

        self._log({name: wandb.Image(str(path), caption=caption)}, step)

    def table(self, name: str, columns: list[str], rows: Sequence[Sequence[object]], step: int) -> None:
        import wandb

        self._log({name: wandb.Table(columns=[*columns], data=[[*row] for row in rows])}, step)

    def event(self, text: str, step: int | None) -> None:
        title = text.split(":", 1)[0]
        if self.settings.alerts and title in ("diverged", "failed"):
            self.wandb.alert(title, text)

    def finish(self, summary: Mapping[str, object], failed: bool) -> None:
        # `loss` is the training's
        self.wandb.summary.update({"final_loss" if key == "loss" else key: value for key, value in summary.items()})
        if self.settings.artifacts:
            self._keep_checkpoints(summary)
        if self.settings.alerts and not failed:
            numbers = {key: summary[key] for key in METRICS if isinstance(summary.get(key), int | float)}
            result = next((f"{key} {value:.4g}" for key, value in numbers.items()), "")
            self.wandb.alert("finished", f"{self.run.name} {result}".strip())
        self.wandb.finish(exit_code=int(failed))

    def _keep_checkpoints(self, summary: Mapping[str, object]) -> None:
        """The newest checkpoint as an artifact, with the alias `best` where it is that; else the best one too."""
        import wandb

        best = self.run / CHECKPOINTS / BEST
        newest = checkpoints_of(self.run)[-1:]
        chosen = {path.resolve(): ["latest"] + (["final"] if summary else []) for path in newest}
        if best.exists():
            chosen[best.resolve()] = [*chosen.get(best.resolve(), []), "best"]
        for path, aliases in chosen.items():
            artifact = wandb.Artifact(f"{self.run.name}-{self.wandb.id}"[:120], type="model")
            artifact.add_dir(str(path))
            for name in (CONFIG, CLASSES):  # with which init=wandb:... is as good as the run
                if (self.run / name).is_file():
                    artifact.add_file(str(self.run / name), name)
            self.wandb.log_artifact(artifact, aliases=list(dict.fromkeys([*aliases, path.name])))


def run_id(run: Path) -> str:
    """The id of this directory's W&B run, from its own file or, where that is damaged, from the client's folders; a new
    one where there is none."""
    path = run / "wandb_id.txt"
    stored = path.read_text(errors="replace").strip() if path.exists() else None
    if stored is not None and ID.fullmatch(stored):
        return stored
    folders = sorted((run / "wandb").glob("*run-*_*-*"), key=lambda folder: folder.stat().st_mtime)
    known = [folder.name.rpartition("-")[2] for folder in folders if folder.name.startswith(("run-", "offline-run-"))]
    name = known[-1] if known else secrets.token_hex(4)
    if stored is not None:
        log.warning("%s holds no id of a W&B run (%r): the run is recorded as %s", path, stored[:40], name)
    write_text(path, name)
    return name


def start_run(run: Path, config: Mapping[str, object], settings: WandbSettings) -> "Run":
    """The W&B run of this directory; offline where the service does not answer or refuses."""
    import wandb

    timeout_s = settings.timeout_s
    limits = wandb.Settings(
        init_timeout=min(START_S, timeout_s),
        finish_timeout=timeout_s,
        x_graphql_timeout_seconds=min(CALL_S, timeout_s),  # an alert that is not taken would hold up the end
        x_graphql_retry_max=1,
    )

    def start(mode: Literal["online", "offline"]) -> "Run":
        return wandb.init(
            mode=mode,
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            job_type=settings.job_type,
            notes=settings.notes,
            tags=settings.tags,
            id=None if AGENT in os.environ else run_id(run),
            dir=str(run),
            config=dict(config),
            name=run.name,
            resume="allow",
            settings=limits,
        )

    if settings.mode == "online":
        try:
            return start("online")
        except Exception as error:  # never fatal
            trouble = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            wandb.teardown()  # the client holds on to the id otherwise
        log.warning(
            "W&B cannot be used (%s): the run is recorded offline; wandb sync %s/wandb/* sends it", trouble, run
        )
    return start("offline")


def wandb_tracker(run: Path, config: Mapping[str, object], *, settings: WandbSettings) -> Tracker:
    """The W&B tracker, or none for `mode: off`."""
    return Tracker() if settings.mode == "off" else NonFatal(lambda: WandB(run, config, settings), "W&B")
