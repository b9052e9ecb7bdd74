"""W&B and TensorBoard get everything a run tells, keep one run a directory, and never end or stall it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, TINY_PRETRAIN, run_cli, run_here
from wandb_files import OfflineRun
from wandb_server import Service, serving

from mae import norms, track
from mae.track_wandb import wandb_tracker
from mae.tracker import Tracker

OFFLINE = ["wandb=offline", "wandb.group=g", "wandb.tags=[a,b]", "wandb.notes=hello"]


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return track.read_lines(run / name)


def offline_runs(run: Path) -> list[OfflineRun]:
    return [OfflineRun(path) for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))]


@pytest.fixture(autouse=True)
def _quiet_client(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb_data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))


# ---------------------------------------------------------------- offline, read back


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Path:
    """A finished pre-training run that was recorded offline, with artifacts."""
    run = tmp_path_factory.mktemp("offline") / "run"
    assert run_here(run, *TINY_PRETRAIN, *OFFLINE, "wandb.artifacts=true") == 0
    return run


def test_an_offline_run_holds_config_metrics_pictures_and_summary(offline):
    (told,) = offline_runs(offline)
    assert told.config["task"]["mask_ratio"] == 0.75 and told.config["model"]["embed_dim"] == 32
    assert (told.group, told.tags, told.notes, told.job_type) == ("g", ["a", "b"], "hello", "pretrain")
    ours = {key for row in lines(offline) for key in row}
    assert ours <= {key for row in told.history for key in row}
    by_step = {row["_step"]: row for row in told.history}
    for row in lines(offline):
        for key, value in row.items():
            if value is not None and key not in ("step", "images_seen", "epoch"):
                assert by_step[row["step"]][key] == pytest.approx(value)
    picture = next(row["reconstruction"] for row in told.history if "reconstruction" in row)
    assert picture["_type"] == "image-file" and "mask ratio 0.75" in picture["caption"]
    assert list((offline / "wandb").glob(f"offline-run-*/files/{picture['path']}"))
    assert told.summary["val_loss"] == json.loads((offline / "summary.json").read_text())["val_loss"]


def test_metrics_stand_against_images_seen_with_min_max_and_last(offline):
    (told,) = offline_runs(offline)
    assert told.metrics["*"].step_metric_index or told.metrics["*"].step_metric == "images_seen"
    kept = told.metrics["val/*"].summary
    assert kept.min and kept.max and kept.last


def test_checkpoints_become_artifacts_and_the_end_an_alert(offline):
    (told,) = offline_runs(offline)
    (artifact,) = told.artifacts
    assert artifact.type == "model" and {"latest", "final", "step_00000010"} <= set(artifact.aliases)
    assert [alert.title for alert in told.alerts] == ["finished"]


def test_norms_of_blocks_and_rates_of_layers_are_on_the_log_points(offline, tmp_path):
    row = next(row for row in lines(offline) if "loss" in row)
    assert {"grad_norm/blocks.0", "weight_norm/blocks.1", "grad_norm/decoder_blocks.0"} <= row.keys()
    squares = sum(value**2 for key, value in row.items() if key.startswith("grad_norm/"))
    assert squares**0.5 == pytest.approx(row["grad_norm"], rel=1e-4)
    assert not any(key.startswith("lr/") for key in row)  # one rate for all
    run = tmp_path / "run"
    steps = ["task=finetune", "task.batch_size=32", "task.max_steps=3", "task.log_every_steps=1", *OFFLINE]
    assert run_here(run, *TINY, *steps, f"init={offline}") == 0
    row = next(row for row in lines(run) if "loss" in row and row["lr"])
    assert row["lr/layer_00"] == pytest.approx(row["lr"] * 0.85**3) and row["lr/layer_03"] == row["lr"]
    (told,) = offline_runs(run)
    tables = {key: row[key] for row in told.history for key in row if "table" in str(row[key])}
    assert {"predictions", "confusion_cells"} <= tables.keys() and tables["predictions"]["nrows"] == 200
    assert any(row.get("confusion", {}).get("_type") == "image-file" for row in told.history)
    assert told.job_type == "finetune"


def test_a_killed_and_resumed_run_keeps_its_id(tmp_path):
    run = tmp_path / "run"
    arguments = [*TINY_PRETRAIN, "task.epochs=40", "checkpoint.every_epochs=1", *OFFLINE, f"output_dir={run}"]
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not len(list((run / "checkpoints").glob("step_*"))) > 1:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert run_cli(*arguments).returncode == 0
    first, second = offline_runs(run)
    assert first.id == second.id == (run / "wandb_id.txt").read_text().strip()
    steps = {row["_step"] for told in (first, second) for row in told.history}
    assert steps == set(range(0, 201)) | {0}
    assert any("resumed at step" in row["event"] for row in lines(run, "events.jsonl"))


# ---------------------------------------------------------------- online, on loopback


@pytest.fixture
def service(monkeypatch):
    """A running server; the client, which reads its environment once a process, is made to read it again."""
    import wandb

    wandb.teardown()
    with serving() as service:
        for name, value in service.environment().items():
            monkeypatch.setenv(name, value)
        yield service
        wandb.teardown()


def only(service: Service) -> dict:
    (run,) = service.runs.values()
    return run


def test_everything_arrives_online_and_a_resumed_run_goes_on(service, tmp_path):
    run = tmp_path / "run"
    start = [*TINY_PRETRAIN, "wandb=online", "wandb.group=g"]
    assert run_here(run, *start) == 0
    told = only(service)
    assert told["config"]["task"]["value"]["mask_ratio"] == 0.75 and told["groupName"] == "g"
    assert [row["loss"] for row in told["history"] if "loss" in row] == [r["loss"] for r in lines(run) if "loss" in r]
    assert "val_loss" in told["summary"] and told["exitcode"] == 0
    assert any(name.startswith("media/images/reconstruction") for name in told["files"])
    (run / "summary.json").unlink()
    assert run_here(run, *start) == 0
    assert len(service.runs) == 1 and only(service)["resumes"] >= 1


def test_a_service_that_fails_and_comes_back_gets_all(service, tmp_path):
    tracker = online(tmp_path, 60.0)
    tracker.log({"step": 1, "images_seen": 1, "epoch": 0.1, "loss": 1.0})
    service.failing = True
    tracker.log({"step": 2, "images_seen": 2, "epoch": 0.2, "loss": 0.9})
    wait_for(lambda: service.calls > 5)
    service.stop()  # and then it is gone altogether
    tracker.log({"step": 3, "images_seen": 3, "epoch": 0.3, "loss": 0.8})
    time.sleep(0.5)
    service.failing = False
    service.start()
    tracker.log({"step": 4, "images_seen": 4, "epoch": 0.4, "loss": 0.7})
    tracker.finish({"val_loss": 0.5}, failed=False)
    assert [row["loss"] for row in only(service)["history"] if "loss" in row] == [1.0, 0.9, 0.8, 0.7]


def online(run: Path, timeout_s: float) -> Tracker:
    given = dict(project="mae", entity=None, group=None, job_type=None, notes=None, tags=[], artifacts=False)
    return wandb_tracker(run, {}, mode="online", alerts=True, timeout_s=timeout_s, **given)


def wait_for(condition) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("pause", [0.0, 600.0], ids=["500s", "hangs"])
def test_a_service_that_breaks_for_good_does_not_stall_a_run(service, tmp_path, pause):
    tracker = online(tmp_path, 3.0)
    service.failing, service.pause = True, pause
    begin = time.monotonic()
    for step in range(200):
        tracker.log({"step": step, "images_seen": step, "epoch": 0.0, "loss": 1.0})
    assert time.monotonic() - begin < 5
    tracker.finish({"val_loss": 0.5}, failed=False)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("trouble", ["absent", "hangs", "no key"])
def test_a_run_begins_offline_where_the_service_does_not_answer(service, tmp_path, monkeypatch, trouble):
    if trouble == "absent":
        service.stop()
    elif trouble == "hangs":
        service.failing, service.pause = True, 600.0
    else:
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    assert run_here(run, *TINY_PRETRAIN, "wandb=online", "wandb.timeout_s=2") == 0
    assert [row["loss"] for row in lines(run) if "loss" in row]
    (told,) = offline_runs(run)
    assert told.summary["val_loss"] and "W&B cannot be used" in (run / "log.txt").read_text()


def test_an_error_inside_the_client_is_a_warning(tmp_path, monkeypatch, caplog):
    import wandb

    def broken(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", broken)
    with caplog.at_level("WARNING"):
        tracker = online(tmp_path, 3.0)
    tracker.log({"step": 0, "loss": 1.0})
    tracker.finish({}, failed=True)
    assert "W&B is switched off for this run: [Errno 28] No space left on device" in caplog.text


# ---------------------------------------------------------------- TensorBoard, norms


def test_tensorboard_gets_the_same(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert run_here(run, *TINY_PRETRAIN, "tensorboard=true") == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    ours = [row["loss"] for row in lines(run) if "loss" in row]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(ours)
    assert "reconstruction" in tags["images"] and "val/loss" in tags["scalars"]


def test_tensorboard_that_is_not_installed_is_said_at_once(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tensorboard=true needs the package tensorboard"):
        run_here(tmp_path / "run", *TINY_PRETRAIN, "tensorboard=true")


def test_blocks_are_named_as_the_model_names_them():
    names = ["blocks.10.mlp.fc1.weight", "decoder_blocks.0.norm1.bias", "patch_embed.proj.weight", "cls_token"]
    assert [norms.block(name) for name in names] == ["blocks.10", "decoder_blocks.0", "patch_embed", "cls_token"]
