"""Weights & Biases. Never fatal: whatever is wrong with the service costs a warning, and what could not be sent
lies in the run's directory, for `wandb sync`."""

import http.client
import logging
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mae.tracker import Careful, Tracker

log = logging.getLogger(__name__)

AGENT = "WANDB_SWEEP_ID"  # set by `wandb agent`, which then gives the run its id
START_S = 30.0  # that a run's start waits for the service; after that it goes on offline
CALL_S = 10.0  # that a single call, such as an alert, may take


class WandB(Tracker):
    """One W&B run of a run's directory, however often it is started again."""

    def __init__(
        self, run: Path, config: Mapping[str, Any], settings: Mapping[str, Any], artifacts: bool, alerts: bool
    ):
        self.run, self.artifacts, self.alerts = run, artifacts, alerts
        self.agent = AGENT in os.environ
        self.wandb = start(run, config, settings)
        define = self.wandb.define_metric
        define("images_seen", hidden=True)
        define("epoch", hidden=True)
        define("*", step_metric="images_seen")
        define("loss", step_metric="images_seen", summary="min,max,last")
        define("val/*", step_metric="images_seen", summary="min,max,last")

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._log({key: value for key, value in metrics.items() if value is not None}, int(metrics["step"]))

    def _log(self, values: dict[str, Any], step: int) -> None:
        # the stages of a pipeline share an agent's run and each counts from 0: W&B then counts by itself
        self.wandb.log(values, step=None if self.agent else step)

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        import wandb

        self._log({name: wandb.Image(str(path), caption=caption)}, step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        import wandb

        self._log({name: wandb.Table(columns=list[Any](columns), data=list[Any](rows))}, step)

    def event(self, text: str, step: int | None) -> None:
        title = text.split(":", 1)[0]
        if self.alerts and title in ("diverged", "failed"):
            self.wandb.alert(title, text)

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        # `loss` is the training's
        self.wandb.summary.update({"final_loss" if key == "loss" else key: value for key, value in summary.items()})
        if self.artifacts:
            self._keep_checkpoints(summary)
        if self.alerts and not failed:
            result = next((f"{key} {summary[key]:.4g}" for key in ("top1", "val_loss") if key in summary), "")
            self.wandb.alert("finished", f"{self.run.name} {result}".strip())
        self.wandb.finish(exit_code=int(failed))

    def _keep_checkpoints(self, summary: Mapping[str, Any]) -> None:
        """The newest checkpoint as an artifact, with the alias `best` where it is that; else the best one too."""
        import wandb

        folder = self.run / "checkpoints"
        steps = sorted(path for path in folder.glob("step_*") if path.is_dir())
        best = folder / "best"
        chosen = {path.resolve(): ["latest"] + (["final"] if summary else []) for path in steps[-1:]}
        if best.exists():
            chosen[best.resolve()] = [*chosen.get(best.resolve(), []), "best"]
        for path, aliases in chosen.items():
            artifact = wandb.Artifact(f"{self.run.name}-{self.wandb.id}"[:120], type="model")
            artifact.add_dir(str(path))
            self.wandb.log_artifact(artifact, aliases=[*aliases, path.name])


def start(run: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """The W&B run of this directory; offline where the service does not answer or refuses."""
    import wandb
    from wandb.errors import Error as WandbError

    identity = run / "wandb_id.txt"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    given: dict[str, Any] = dict(settings) | {
        "dir": str(run),
        "config": dict(config),
        "name": run.name,
        "resume": "allow",
    }
    if AGENT not in os.environ:
        given["id"] = identity.read_text().strip()
    if given["mode"] == "online":
        trouble = unreachable(wandb.setup().settings.base_url, given["settings"].init_timeout)
        try:
            if trouble is None:
                return wandb.init(**given)
        except WandbError as error:
            trouble = str(error).splitlines()[0].rstrip(".")
            wandb.teardown()  # the client holds on to the id otherwise
        log.warning(
            "W&B cannot be used (%s): the run is recorded offline; wandb sync %s/wandb/* sends it", trouble, run
        )
        given["mode"] = "offline"
    return wandb.init(**given)


def unreachable(url: str, timeout_s: float) -> str | None:
    """Why a service does not answer, or None where it does. The client itself would wait for minutes."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=timeout_s):
            return None
    except urllib.error.HTTPError as error:
        return str(error) if error.code >= 500 else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error)


def wandb_tracker(
    run: Path,
    config: Mapping[str, Any],
    *,
    mode: Literal["online", "offline", "off"],
    project: str,
    entity: str | None,
    group: str | None,
    job_type: str | None,
    notes: str | None,
    tags: list[str],
    artifacts: bool,
    alerts: bool,
    timeout_s: float,
) -> Tracker:
    """The W&B tracker, or none for `mode: off`."""
    if mode == "off":
        return Tracker()

    def make() -> Tracker:
        import wandb

        limits = wandb.Settings(
            init_timeout=min(START_S, timeout_s),
            finish_timeout=timeout_s,
            x_graphql_timeout_seconds=min(CALL_S, timeout_s),  # an alert that is not taken would hold up the end
            x_graphql_retry_max=1,
        )
        given = {"mode": mode, "project": project, "entity": entity, "group": group, "job_type": job_type}
        return WandB(run, config, given | {"notes": notes, "tags": tags, "settings": limits}, artifacts, alerts)

    return Careful(make, "W&B")
