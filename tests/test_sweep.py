"""Sweeps: members and their directories, starting again, the end, and the same for W&B's agent."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, TINY_PRETRAIN, composed, run_cli, run_main
from matplotlib.figure import Figure

from mae import cli
from mae.config import sweep_names
from mae.config.saved import write_config
from mae.errors import UserError
from mae.launch.pipeline import pretraining
from mae.report import sweep, sweep_figure
from mae.report.flops import pretraining_flops, relative_flops
from mae.report.members import Member, Sweep, lower_is_better, read_sweep
from mae.report.record import Record, read_record
from mae.report.sweep_figure import Curve
from mae.tools.planned_model import model_on_meta, operations
from mae.tools.run_rows import read_rows

FILES = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml"))
SMALL = [one for one in TINY if "precision" not in one]
QUICK = [
    *SMALL,
    'task.overrides.pretrain=["task.batch_size=32","task.epochs=1","task.warmup_epochs=0"]',
    'task.overrides.linprobe=["task.batch_size=32","task.epochs=1","task.warmup_epochs=0"]',
    'task.overrides.finetune=["task.batch_size=32","task.epochs=1","task.warmup_epochs=0"]',
]


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- names


def test_a_member_is_named_by_what_is_swept():
    name = sweep_names.member_name
    assert name(["optimizer.layer_decay", "seed"], ["seed=1", "optimizer.layer_decay=0.65", "task=finetune"]) == (
        "layer_decay_0.65-seed_1"
    )
    assert name(["model.depth", "model.decoder.depth"], ["model.depth=1", "model.decoder.depth=2"]) == (
        "model.depth_1-model.decoder.depth_2"
    )
    assert name(["a.x"], ["+a.x=1", "+a.x=[1, 2]"]) == "x__1_2_"
    assert name([], []) == "member" and len(name(["x"], ["x=" + "y" * 400])) < 140


def test_only_what_has_several_values_is_swept():
    typed = ["-m", "+sweeps=seeds", "task.mask_ratio=0.5,0.75", "task.k=[1,2]", "seed=range(0,3)", "--bad", "x=[1"]
    assert sweep_names.swept(typed) == ["task.mask_ratio", "seed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_sweep_composes_from_any_directory(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = run_main(["-m", f"+sweeps={name}", "dry_run=true", "seed=7", "device=cpu"], monkeypatch, cli.main)
    written = capsys.readouterr()
    assert code == 0, written.err
    members = sorted(re.findall(rf"writes to +runs/sweep_{name}/(.+)", written.out))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    given = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    ((key, values),) = given["hydra"]["sweeper"]["params"].items()
    expected = ["7"] if key == "seed" else str(values).split(",")  # the command line wins over the file
    prefix = f"{key.rsplit('.', 1)[-1]}_"
    written = [repr(float(value)) if "e-" in value else value for value in expected]  # Hydra writes 3e-3 as 0.003
    named = given["members"] if key == "member" else [f"{prefix}{value}" for value in written]
    assert members == sorted(named)


# ---------------------------------------------------------------- a whole sweep


@pytest.fixture(scope="module")
def ratios(tmp_path_factory) -> Path:
    """The working directory of a finished sweep of two pipelines."""
    place = tmp_path_factory.mktemp("ratios")
    ended = run_cli("-m", "+sweeps=mask_ratio", "task.mask_ratio=0.5,0.75", *QUICK, cwd=place)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].split("  ")[1].startswith("runs/sweep_mask_ratio/mask_ratio_")
    return place / "runs" / "sweep_mask_ratio"


def test_a_sweep_ends_in_a_table_a_figure_and_a_page(ratios):
    rows = table(ratios)
    assert [row["task.mask_ratio"] for row in rows] == ["0.5", "0.75"]
    for row in rows:
        stage = json.loads((ratios / row["member"] / "finetune" / "summary.json").read_text())
        assert float(row["finetune top1"]) == stage["top1"] and row["linprobe top1"] and row["state"] == "finished"
        assert row["command"].startswith("python run.py task.mask_ratio=")
    assert (ratios / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (ratios / "sweep.svg").read_text()
    assert drawn.startswith("<?xml") and "<path" in drawn
    page = (ratios / "report.html").read_text()
    assert '"metric": "finetune top1"' in page and '"best": "mask_ratio_' in page
    assert (ratios / "mask_ratio_0.5" / "report.html").exists()


def test_the_best_member_s_command_composes_to_its_config(ratios):
    found = read_sweep(ratios)
    assert found.best is not None and found.metric == "finetune top1"
    again = composed(*found.best.record.overrides)
    kept = found.best.cfg
    assert again.task == kept.task and again.model == kept.model and again.seed == kept.seed


@pytest.mark.slow
def test_a_sweep_started_again_runs_only_what_is_missing(ratios):
    kept, lost = ratios / "mask_ratio_0.5", ratios / "mask_ratio_0.75"
    before = {p: p.stat().st_mtime_ns for p in kept.rglob("*") if p.is_file()}
    figure, rows = (ratios / "sweep.svg").read_bytes(), table(ratios)
    for path in (lost / "summary.json", lost / "finetune" / "summary.json"):
        path.unlink()
    ended = run_cli("-m", "+sweeps=mask_ratio", "task.mask_ratio=0.5,0.75", *QUICK, cwd=ratios.parent.parent)
    assert ended.returncode == 0, ended.stderr
    assert {p: p.stat().st_mtime_ns for p in kept.rglob("*") if p.is_file()} == before
    same = ("member", "state", "task.mask_ratio", "finetune top1", "linprobe top1", "pretrain val_loss", "command")
    assert [[row[k] for k in same] for row in table(ratios)] == [[row[k] for k in same] for row in rows]
    strip = [line for line in figure.decode().splitlines() if "#" not in line and "id=" not in line]
    now = (ratios / "sweep.svg").read_text().splitlines()
    assert [line for line in now if "#" not in line and "id=" not in line] == strip


def test_the_end_is_made_again_from_the_directories_alone(ratios):
    for name in ("sweep.csv", "sweep.png", "sweep.svg", "report.html"):
        (ratios / name).unlink()
    (ratios / "multirun.yaml").rename(ratios / "kept.yaml")
    command = [sys.executable, "-m", "mae.sweep", str(ratios)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (ratios / "kept.yaml").rename(ratios / "multirun.yaml")
    assert ended.returncode == 0 and "finetune top1" in ended.stdout.splitlines()[-1]
    assert [row["task.mask_ratio"] for row in table(ratios)] == ["0.5", "0.75"]
    assert (ratios / "sweep.png").exists() and (ratios / "report.html").exists()


def test_a_directory_without_runs_is_said(tmp_path, capsys):
    assert sweep.main([str(tmp_path / "none")]) == 1
    assert "is not the directory of a sweep: it does not exist." in capsys.readouterr().err
    assert sweep.main([str(tmp_path)]) == 1
    assert "holds no run: a sweep's members lie in folders of it" in capsys.readouterr().err
    assert sweep.main([]) == 2


@pytest.mark.slow
def test_one_checkpoint_is_made_once_for_all_members(tmp_path):
    small = [*TINY, "task.batch_size=32", "task.epochs=1", "task.warmup_epochs=0"]
    ended = run_cli("-m", "+sweeps=layer_decay", "optimizer.layer_decay=0.5,1.0", *small, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("init=auto: pre-training comes first") == 1
    (parent,) = (tmp_path / "runs").glob("pretrain-*")
    members = read_sweep(tmp_path / "runs" / "sweep_layer_decay").members
    assert [str(m.cfg.init) for m in members] == [str(parent)] * 2
    assert [m.values["optimizer.layer_decay"] for m in members] == [0.5, 1.0]


def test_the_automatic_parent_is_what_a_plain_run_leaves():
    from mae.config.identity import run_directory

    parent = pretraining(composed("task=finetune", "init=auto", "seed=3"))
    assert parent.output_dir == str(run_directory(composed()))


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_goes_on(tmp_path):
    arguments = ["-m", *TINY_PRETRAIN, "task.epochs=12", "checkpoint.every_epochs=1", "task.mask_ratio=0.5,0.75"]
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    place = tmp_path / "runs" / "sweep-task.mask_ratio"
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((place / "mask_ratio_0.75" / "checkpoints").glob("step_*")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = (place / "mask_ratio_0.5" / "metrics.jsonl").stat().st_mtime_ns
    ended = run_cli(*arguments, cwd=tmp_path)
    assert ended.returncode == 0 and "goes on from" in ended.stderr
    assert (place / "mask_ratio_0.5" / "metrics.jsonl").stat().st_mtime_ns == done
    assert [row["state"] for row in table(place)] == ["finished", "finished"]


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_stops_as_a_whole(tmp_path):
    arguments = ["-m", *TINY_PRETRAIN, "task.epochs=200", "task.mask_ratio=0.5,0.75"]
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    place = tmp_path / "runs" / "sweep-task.mask_ratio"
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (place / "mask_ratio_0.5" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert [row["state"] for row in table(place)] == ["interrupted", "not started"]


@pytest.mark.slow
def test_a_pipeline_whose_stage_is_interrupted_or_fails_is_so_itself(tmp_path):
    words = [*SMALL, "task=pipeline", "task.stages=[pretrain,knn]", "output_dir=run"]
    long = ['task.overrides.pretrain=["task.epochs=300","task.batch_size=32"]']
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *words, *long], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "pretrain" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert {row.run: row.state for row in read_rows(tmp_path)} == {"run": "interrupted", "run/pretrain": "interrupted"}

    quick = ['task.overrides.pretrain=["task.epochs=1","task.warmup_epochs=0"]']
    (tmp_path / "empty").mkdir()
    ended = run_cli(*words[:-1], *quick, "output_dir=failed", "data=folder", "data.root=empty", cwd=tmp_path)
    assert ended.returncode == 1 and "stage 1 of 2: pretrain" in ended.stderr
    assert read_record(tmp_path / "failed").state == "failed"


# ---------------------------------------------------------------- parts of the end


def member(name: str, task: str = "task=pretrain", **results: float) -> Member:
    record = Record("finished", {}, [], [], [])
    return Member(Path(name), composed(task), record, results=dict(results))


def test_the_best_is_the_lowest_loss_or_the_highest_accuracy():
    losses = Sweep(Path(), "s", [], [member("a", val_loss=0.3), member("b", val_loss=0.2)])
    assert losses.best is not None and losses.best.name == "b"
    hits = Sweep(Path(), "s", [], [member("a", top1=3.0), member("b", top1=2.0)])
    assert hits.best is not None and hits.best.name == "a"


def test_a_figure_shows_mean_and_deviation_over_seeds():
    members = []
    for ratio in (0.5, 0.75):
        for seed, top1 in enumerate((80.0, 84.0)):
            one = member(f"{ratio}{seed}", "task=linprobe", top1=top1)
            one.values = {"task.mask_ratio": ratio, "seed": seed}
            members.append(one)
    (curve,) = sweep.figure_curves(Sweep(Path(), "s", ["task.mask_ratio", "seed"], members))
    assert curve.points == {0.5: [80.0, 84.0], 0.75: [80.0, 84.0]} and curve.stage == "linprobe"


def test_a_range_of_mask_ratios_is_a_bar_among_numbers():
    curve = Curve("top1", "linprobe", "task.mask_ratio", "", {0.5: [80.0], 0.75: [84.0], "[0.6, 0.9]": [86.0]})
    axes = Figure().subplots()
    sweep_figure.draw_panel(axes, [curve], composed())
    bars = [line for line in axes.lines if list(line.get_xdata()) == [0.6, 0.9]]  # type: ignore[arg-type]
    assert len(bars) == 1 and list(bars[0].get_ydata()) == [86.0, 86.0]  # type: ignore[arg-type]
    assert [text.get_text() for text in axes.texts] == ["[0.6, 0.9]"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.5", "0.75", "0.1"]  # the paper's point
    alone = Curve("top1", "linprobe", "task.mask_ratio", "", {"[0.6, 0.9]": [86.0]})
    axes = Figure().subplots()
    sweep_figure.draw_panel(axes, [alone], composed())
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["[0.6, 0.9]"]


def test_published_epochs_of_pretraining_are_not_drawn_beside_those_of_finetuning():
    curve = Curve("top1", "finetune", "task.epochs", "", {10: [80.0], 20: [84.0]})
    theirs = {}
    for task in ("finetune", "pipeline"):
        axes = Figure().subplots()
        sweep_figure.draw_panel(axes, [curve], composed(f"task={task}", *["init=unused"][: task == "finetune"]))
        theirs[task] = [tick.get_text() for tick in axes.get_xticklabels()]
    assert theirs == {"finetune": ["10", "20"], "pipeline": ["10", "20", "5"]}


def test_losses_of_other_tasks_are_said_not_to_compare():
    words = "A validation loss is of the member's own masks and target: it does not compare"
    for key, values in {"task.mask_ratio": (0.25, 0.75), "optimizer.base_lr": (1e-3, 2e-3)}.items():
        members = [member(str(value), f"{key}={value}", val_loss=value) for value in values]
        for each, value in zip(members, values, strict=True):
            each.values = {key: value}
        text = sweep.sweep_result(Sweep(Path(), "s", [key], members))
        assert (words in text) is (key == "task.mask_ratio") and "Best member" in text
    named = [member(name, f"masking={name}", val_loss=0.1) for name in ("random", "grid")]
    for axis in ("member", "mine"):  # "mine" is the name of a sweep's file
        assert words in sweep.sweep_result(Sweep(Path(), "s", [axis], named))
    named = [member(name, f"seed={number}", val_loss=0.1) for number, name in enumerate("ab")]
    assert words not in sweep.sweep_result(Sweep(Path(), "s", ["mine"], named))


def test_which_results_are_better_where_they_are_lower():
    assert [key for key in ("mce", "ece", "loss", "seconds", "top1", "miou") if lower_is_better(key)] == [
        "mce", "ece", "loss", "seconds"
    ]  # fmt: skip


def test_paths_on_an_axis_are_shown_by_what_differs():
    parts = sweep_figure.differing_parts
    assert parts(["runs/a/ratio_0.5/pretrain", "runs/a/ratio_0.9/pretrain"]) == ["ratio_0.5", "ratio_0.9"]
    assert parts(["a/b", "a/b/c"]) == ["b", "b/c"] and parts(["a/b"]) == ["a/b"] and parts(["x", "y"]) == ["x", "y"]


def test_panels_of_a_key_have_one_range(tmp_path):
    curves = [
        Curve(f"{stage} top1", stage, "task.mask_ratio", "", {0.5: [80.0], 0.75: [84.0]})
        for stage in ("finetune", "linprobe")  # of which the second alone has a published point at 0.1
    ]
    figure = sweep_figure.figure_of(curves, composed())
    limits = {axes.get_xlim() for axes in figure.axes}
    assert len(limits) == 1 and limits.pop()[0] < 0.1


def test_operations_of_a_config_are_those_that_the_model_counts():
    for more in ([], ["model.mask_tokens=encoder"], ["target=pca", "task.mask_ratio=0.6"], ["model.decoder_depth=3"]):
        cfg = composed("task=pretrain", *more)
        model = model_on_meta(cfg)
        assert pretraining_flops(cfg) == operations(cfg, model)[0].total
    for other in (["model.decoder=cross"], ["target=hog"], ["task.mask_ratio=[0.5,0.9]"]):
        assert pretraining_flops(composed("task=pretrain", *other)) is None
    assert pretraining_flops(composed("task=finetune", "init=unused")) is None
    assert pretraining_flops(composed("task=pipeline")) is None


def test_the_cost_of_a_pipeline_is_that_of_the_stage_that_pretrains(tmp_path):
    members = [
        Member(tmp_path / name, composed("task=pipeline"), Record("finished", {}, [], [], []))
        for name in ("half", "most")
    ]
    for member, ratio in zip(members, (0.5, 0.75), strict=True):
        (member.path / "pretrain").mkdir(parents=True)
        write_config(member.path / "pretrain", composed("task=pretrain", f"task.mask_ratio={ratio}"))
    half, most = (pretraining_flops(composed("task=pretrain", f"task.mask_ratio={r}")) for r in (0.5, 0.75))
    assert half and most and relative_flops(members) == {"half": half / most, "most": 1.0}
    shutil.rmtree(members[0].path)  # not begun
    assert relative_flops(members) == {}


def test_a_sweep_names_what_its_members_cost():
    members = [member("decoder"), member("encoder")]
    members[1].cfg = composed("model.mask_tokens=encoder")
    found = Sweep(Path(), "s", [], members)
    columns = sweep.flops_columns(found)
    factor = columns["GFLOPs over the least"]["encoder"]
    assert columns["GFLOPs over the least"]["decoder"] == 1 and factor > 1.5
    expected = f"Operations an image in pre-training: encoder takes {factor:.2g} times those of decoder."
    assert sweep.flops_sentence(found) == expected
    assert sweep.flops_sentence(Sweep(Path(), "s", [], members[:1])) is None


def test_only_published_numbers_are_drawn_as_the_paper_s():
    from mae.report.paper_results import PUBLISHED

    assert PUBLISHED["task.mask_ratio"]["linprobe"].points == {0.1: 54.6, 0.75: 73.5}
    assert PUBLISHED["task.finetune_blocks"]["finetune"].points == {"0": 73.5, "0.5": 79.1, "1": 81.0, "null": 84.9}
    width = PUBLISHED["model.decoder_embed_dim"]
    assert width["finetune"].points == {128: 84.9, 256: 84.8, 512: 84.9, 768: 84.4, 1024: 84.3}
    assert width["linprobe"].points == {128: 69.1, 256: 71.3, 512: 73.5, 768: 73.1, 1024: 73.1}
    depth = PUBLISHED["model.decoder_depth"]
    assert depth["finetune"].points == {1: 84.8, 2: 84.9, 4: 84.9, 8: 84.9, 12: 84.4}
    assert depth["linprobe"].points == {1: 65.5, 2: 70.0, 4: 71.9, 8: 73.5, 12: 73.3}


@pytest.mark.slow
def test_members_that_failed_are_named_and_do_not_end_the_others(tmp_path):
    sizes = ["task.max_steps=1", "task.drop_last=true", "task.batch_size=1024,32"]
    ended = run_cli("-m", *TINY_PRETRAIN, *sizes, f"hydra.sweep.dir={tmp_path / 's'}")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    states = {row["member"]: row["state"] for row in table(tmp_path / "s")}
    assert states == {"batch_size_1024": "failed", "batch_size_32": "finished"}
    assert "1 of 2 members is not finished" in ended.stdout


def test_members_that_have_not_begun_make_no_report(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_sweep(tmp_path)


# ---------------------------------------------------------------- the same under `wandb agent`


def agent_command(path: Path, values: dict) -> list[str]:
    """The command line that `wandb agent` builds of a sweep's file, by the client's own code."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    given = yaml.safe_load(path.read_text())
    pieces = create_sweep_command(given["command"])
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    replaced = {"${program}": given["program"], "${interpreter}": sys.executable, "${env}": "/usr/bin/env"}
    found = []
    for piece in pieces:
        if piece == "${args_no_hyphens}":
            found += arguments["args_no_hyphens"]
        else:
            found.append(replaced.get(piece, piece))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_file_for_wandb_says_the_same_and_its_command_composes(name, monkeypatch, capsys):
    path = ROOT / "sweeps" / "wandb" / f"{name}.yaml"
    ours = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    ((key, values),) = ours["hydra"]["sweeper"]["params"].items()
    theirs = yaml.safe_load(path.read_text())["parameters"][key]["values"]
    if key == "member":
        assert theirs == list(ours["members"])
    else:
        assert theirs == [yaml.safe_load(v) if "e-" not in v else float(v) for v in str(values).split(",")]
    odd = {"task.clip_grad": None, "data.hflip": True, "data.mean": [0.25, 0.5, 0.75], "optimizer.min_lr": 1e-07}
    if {"override /task": "pipeline"} in ours.get("defaults", []):
        odd = {"init": None, "data.hflip": True, "data.mean": [0.25, 0.5, 0.75], "data.max_bad_fraction": 1e-07}
    command = agent_command(path, {key: theirs[0]} | odd)
    program, words = command[:3], command[3:]
    assert program == ["/usr/bin/env", sys.executable, "run.py"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    code = run_main([*words, "dry_run=true"], monkeypatch, cli.main)
    assert code == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run_main([*words, "--cfg", "job"], monkeypatch, cli.main) == 0
    cfg = yaml.safe_load(capsys.readouterr().out)
    assert cfg["data"]["hflip"] is True and cfg["data"]["mean"] == [0.25, 0.5, 0.75]
