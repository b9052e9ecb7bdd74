"""W&B and TensorBoard get everything a run tells, keep one run a directory, and never end or stall it."""

import contextlib
import json
import os
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, TINY, TINY_PRETRAIN, run_cli, run_here
from wandb_files import OfflineRun
from wandb_server import Service, serving

from mae.config.build import call
from mae.runs import files
from mae.tracking import norms
from mae.tracking import wandb as track_wandb
from mae.tracking.base import Tracker
from mae.tracking.tensorboard import TensorBoard
from mae.tracking.wandb import wandb_tracker

OFFLINE = ["wandb=offline", "wandb.group=g", "wandb.tags=[a,b]", "wandb.notes=hello"]


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return files.read_json_lines(run / name)


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
    (record,) = offline_runs(offline)
    assert record.config["task"]["mask_ratio"] == 0.75 and record.config["model"]["embed_dim"] == 32
    assert (record.group, record.tags, record.notes, record.job_type) == ("g", ["a", "b"], "hello", "pretrain")
    ours = {key for row in lines(offline) for key in row}
    assert ours <= {key for row in record.history for key in row}
    by_step = {row["_step"]: row for row in record.history}
    for row in lines(offline):
        for key, value in row.items():
            if value is not None and key not in ("step", "images_seen", "epoch"):
                assert by_step[row["step"]][key] == pytest.approx(value)
    picture = next(row["reconstruction"] for row in record.history if "reconstruction" in row)
    assert picture["_type"] == "image-file" and "mask ratio 0.75" in picture["caption"]
    assert list((offline / "wandb").glob(f"offline-run-*/files/{picture['path']}"))
    assert record.summary["val_loss"] == json.loads((offline / "summary.json").read_text())["val_loss"]


def test_metrics_stand_against_images_seen_with_min_max_and_last(offline):
    (record,) = offline_runs(offline)
    assert record.metrics["*"].step_metric_index or record.metrics["*"].step_metric == "images_seen"
    validation = record.metrics["val/*"].summary
    assert validation.min and validation.max and validation.last


def test_checkpoints_become_artifacts_and_the_end_an_alert(offline):
    (record,) = offline_runs(offline)
    (artifact,) = record.artifacts
    assert {"config.yaml", "model.safetensors"} <= {entry.path for entry in artifact.manifest.contents}
    assert artifact.type == "model" and {"latest", "final", "step_00000010"} <= set(artifact.aliases)
    assert [alert.title for alert in record.alerts] == ["finished"]


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
    (record,) = offline_runs(run)
    tables = {key: row[key] for row in record.history for key in row if "table" in str(row[key])}
    assert {"predictions", "confusion_cells"} <= tables.keys() and tables["predictions"]["nrows"] == 200
    assert any(row.get("confusion", {}).get("_type") == "image-file" for row in record.history)
    assert record.job_type == "finetune"


@pytest.mark.slow
def test_a_killed_and_resumed_run_keeps_its_id(tmp_path):
    run = tmp_path / "run"
    arguments = [*TINY_PRETRAIN, "task.epochs=60", "checkpoint.every_epochs=1", *OFFLINE, f"output_dir={run}"]
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not any(record.history for record in offline_runs(run)):  # the client writes a block of its file at a time
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert run_cli(*arguments).returncode == 0
    first, second = offline_runs(run)
    assert first.id == second.id == (run / "wandb_id.txt").read_text().strip()
    resumed = next(row["event"] for row in lines(run, "events.jsonl") if "resumed at step" in row["event"])
    since = int(resumed.split()[-1])
    assert {row["_step"] for row in second.history} >= set(range(since + 1, 301)) and since > 0
    known = sorted({row["_step"] for row in first.history})
    assert known == list(range(known[-1] + 1))  # what the client had not written yet is in metrics.jsonl alone


# ---------------------------------------------------------------- online, on loopback
# each in a process of its own: the client reads its environment once a process, and what its end takes counts too


@pytest.fixture
def service():
    with serving() as service:
        yield service


def only(service: Service) -> dict:
    (run,) = service.runs.values()
    return run


@pytest.mark.slow
def test_everything_arrives_online_and_a_resumed_run_goes_on(service, tmp_path):
    run = tmp_path / "run"
    start = [*TINY_PRETRAIN, "wandb=online", "wandb.group=g", f"output_dir={run}"]
    assert run_cli(*start, env=service.environment()).returncode == 0
    record = only(service)
    assert record["config"]["task"]["value"]["mask_ratio"] == 0.75 and record["groupName"] == "g"
    assert [row["loss"] for row in record["history"] if "loss" in row] == [r["loss"] for r in lines(run) if "loss" in r]
    assert "val_loss" in record["summary"] and record["exitcode"] == 0
    assert any(name.startswith("media/images/reconstruction") for name in record["files"])
    (run / "summary.json").unlink()
    assert run_cli(*start, env=service.environment()).returncode == 0
    assert len(service.runs) == 1 and only(service)["resumes"] >= 1


TALK = """
import sys, time
from pathlib import Path
from mae.tracking.wandb import WandbSettings, wandb_tracker
labels = dict(project="mae", entity=None, group=None, job_type=None, notes=None, tags=[])
settings = WandbSettings(mode="online", timeout_s=float(sys.argv[2]), artifacts=False, alerts=True, **labels)
begin = time.monotonic()
tracker = wandb_tracker(Path(sys.argv[1]), {}, settings=settings)
for step, loss in enumerate(range(int(sys.argv[3]))):
    tracker.log({"step": step, "images_seen": step, "epoch": 0.0, "loss": loss})
    if sys.argv[4:] and step == 1:
        print("two", flush=True)
        sys.stdin.readline()
told = time.monotonic()
tracker.finish({"val_loss": 0.5}, failed=False)
print(f"{told - begin:.1f} {time.monotonic() - told:.1f}")
"""


def talk(service: Service, run: Path, *arguments: str) -> subprocess.Popen[str]:
    run.mkdir()
    command = [sys.executable, "-c", TALK, str(run), *arguments]
    environment = os.environ | service.environment()
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_service_that_fails_dies_and_comes_back_gets_all(service, tmp_path):
    process = talk(service, tmp_path / "run", "60", "50", "pause")
    assert process.stdout is not None and process.stdout.readline() == "two\n"
    service.failing, before = True, service.calls
    print("go on", file=process.stdin, flush=True)
    wait_for(lambda: service.calls > before)
    service.stop()  # and then it is gone altogether
    time.sleep(0.5)
    service.failing = False
    service.start()
    assert process.wait(60) == 0
    assert [row["loss"] for row in only(service)["history"] if "loss" in row] == list(range(50))


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.0, 600.0], ids=["500s", "hangs"])
def test_a_service_that_breaks_for_good_does_not_stall_a_run(service, tmp_path, pause):
    process = talk(service, tmp_path / "run", "2", "200", "pause")
    assert process.stdout is not None and process.stdout.readline() == "two\n"
    service.failing, service.pause = True, pause
    text, _ = process.communicate("go on\n", timeout=60)
    logged, finished = (float(value) for value in text.split())
    assert process.returncode == 0 and logged < 20 and finished < 20


@pytest.mark.parametrize("trouble", ["absent", pytest.param("hangs", marks=pytest.mark.slow), "refuses"])
def test_a_run_begins_offline_where_the_service_does_not_answer(service, tmp_path, trouble):
    if trouble == "absent":
        service.stop()
    service.failing = trouble != "absent"
    service.pause, service.code = (600.0, 500) if trouble == "hangs" else (0.0, 401)
    run = tmp_path / "run"
    text, errors = talk(service, run, "2", "5").communicate(timeout=60)
    assert text and "W&B cannot be used" in errors and f"wandb sync {run}" in errors
    (kept,) = offline_runs(run)
    assert [row["loss"] for row in kept.history if "loss" in row] == list(range(5))


@contextmanager
def forward_proxy(target: int) -> Iterator[int]:
    """A proxy for plain HTTP that sends everything to a port of this machine; its own port."""

    def pour(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    class Proxy(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            method, url, version = self.rfile.readline().split(b" ")
            with socket.create_connection(("127.0.0.1", target)) as server:
                path = b"/" + url.split(b"/", 3)[3]
                server.sendall(b" ".join((method, path, version)) + b"Connection: close\r\n")
                threading.Thread(target=self.upload, args=(server,), daemon=True).start()
                pour(server, self.connection)

        def upload(self, server: socket.socket) -> None:
            with contextlib.suppress(OSError, ValueError):  # the connection is closed meanwhile
                while data := self.rfile.read1():
                    server.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy.server_address[1]
        proxy.shutdown()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate that no authority has signed, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    chain, key = folder / "cert.pem", folder / "key.pem"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*words.split(), "-keyout", str(key), "-out", str(chain)], check=True, capture_output=True)
    return chain, key


@pytest.mark.parametrize(
    "way", ["proxy", *(pytest.param(way, marks=pytest.mark.slow) for way in ("insecure", "authority"))]
)
def test_a_service_that_the_client_reaches_in_a_way_of_its_own_is_used(service, tmp_path, way, monkeypatch):
    """Through a proxy set for W&B alone; with a certificate that is not checked, or whose authority is the site's."""
    with contextlib.ExitStack() as stack:
        if way == "proxy":
            port = stack.enter_context(forward_proxy(service.port))
            own = {"WANDB_BASE_URL": "http://wandb.corp.invalid", "WANDB_HTTP_PROXY": f"http://127.0.0.1:{port}"}
        else:
            chain, key = certificate(tmp_path)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(chain, key)
            service.server.socket = context.wrap_socket(service.server.socket, server_side=True)
            own = {"WANDB_BASE_URL": f"https://127.0.0.1:{service.port}"}
            own |= {"WANDB_INSECURE_DISABLE_SSL": "true"} if way == "insecure" else {"SSL_CERT_FILE": str(chain)}
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(service, "environment", lambda: {"WANDB_API_KEY": "k" * 40, "WANDB_SILENT": "true"})
        text, errors = talk(service, tmp_path / "run", "30", "5").communicate(timeout=120)
    assert text and "W&B" not in errors, errors
    assert [row["loss"] for row in only(service)["history"] if "loss" in row] == list(range(5))


@pytest.mark.parametrize("damage", [b"", b"\n", b"\xff\xfe\x00", b"a/b?c"])
def test_a_damaged_id_is_read_from_the_client_s_folders_or_made_anew(tmp_path, damage, caplog):
    (tmp_path / "wandb_id.txt").write_bytes(damage)
    fresh = track_wandb.run_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{8}", fresh) and track_wandb.run_id(tmp_path) == fresh
    assert "wandb_id.txt holds no id of a W&B run" in caplog.text and fresh in caplog.text
    (tmp_path / "wandb_id.txt").write_bytes(damage)
    (tmp_path / "wandb" / "offline-run-20260101_101010-0123abcd").mkdir(parents=True)
    assert track_wandb.run_id(tmp_path) == "0123abcd"
    assert track_wandb.run_id(tmp_path) == (tmp_path / "wandb_id.txt").read_text()


def test_a_run_whose_id_is_an_empty_file_is_recorded(tmp_path):
    (tmp_path / "wandb_id.txt").touch()
    assert run_here(tmp_path, *TINY_PRETRAIN, *OFFLINE, "task.max_steps=1") == 0
    (record,) = offline_runs(tmp_path)
    assert record.id == (tmp_path / "wandb_id.txt").read_text()


def online(run: Path, timeout_s: float) -> Tracker:
    labels = {"project": "mae", "entity": None, "group": None, "job_type": None, "notes": None, "tags": []}
    settings = {"mode": "online", **labels, "artifacts": False, "alerts": True, "timeout_s": timeout_s}
    return call(wandb_tracker, settings, run, {})


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


def test_tensorboard_forgets_a_start_that_left_no_checkpoint_and_events_have_the_last_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (5, 3):
        tracker = TensorBoard(tmp_path)
        tracker.start(0, 9)
        for step in range(1, steps + 1):
            tracker.log({"step": step, "loss": 10.0 * steps + step})
        tracker.event("interrupted", None)
        tracker.finish({}, True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(row.step, row.value) for row in events.Scalars("loss")] == [(1, 31.0), (2, 32.0), (3, 33.0)]
    assert [row.step for row in events.Tensors("events/text_summary")] == [5, 3]  # the reader purges no texts


def test_a_validation_that_is_repeated_at_the_end_has_one_line(tmp_path):
    command = [*TINY_PRETRAIN, "task.max_steps=2"]
    assert run_here(tmp_path, *command) == 0
    validations = [row for row in lines(tmp_path) if "val/loss" in row]
    results = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").unlink()
    assert run_here(tmp_path, *command) == 0
    assert [row for row in lines(tmp_path) if "val/loss" in row] == validations
    assert json.loads((tmp_path / "summary.json").read_text())["val_loss"] == results["val_loss"]


def test_tensorboard_that_is_not_installed_is_said_at_once(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tensorboard=true needs the package tensorboard"):
        run_here(tmp_path / "run", *TINY_PRETRAIN, "tensorboard=true")


def test_blocks_are_named_as_the_model_names_them():
    names = ["blocks.10.mlp.fc1.weight", "decoder_blocks.0.norm1.bias", "patch_embed.proj.weight", "cls_token"]
    assert [norms.block_name(name) for name in names] == ["blocks.10", "decoder_blocks.0", "patch_embed", "cls_token"]


def test_the_dashboard_shows_what_runs_log(capsys, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    from mae.tools import workspace

    text = workspace.workspace("e", "p")._to_model().model_dump_json()
    panels = ('"val/loss"', "val/loss_at_", "lr/layer_", "images_per_second", "reconstruction", "confusion")
    for shown in (*panels, "mask_ratio"):
        assert shown in text
    assert workspace.main(["only"]) == 2 and "ENTITY PROJECT" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert workspace.main(["e", "p"]) == 1 and "mae-experiments[workspace]" in capsys.readouterr().err
