"""run.py as a user types it: good command lines do what they say, bad ones end in a plain sentence."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_PRETRAIN, composed, run_cli, run_here
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from mae import checkpoint
from mae.errors import UserError
from mae.launch import launch
from mae.runs import checkpoints
from mae.tools import cost, dry_run
from mae.tools.cost import forward_flops
from mae.tools.planned_model import model_on_meta, operations, parameters

# ---------------------------------------------------------------- good command lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The directory of a finished run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert run_here(run, *TINY_PRETRAIN) == 0
    return run


def test_help_and_cfg_answer_without_torch():
    for arguments, expected in ((["--help"], "python run.py resume=RUN"), (["--cfg", "job"], "mask_ratio: 0.75")):
        begin = time.perf_counter()
        ended = run_cli(*arguments)
        assert ended.returncode == 0 and expected in ended.stdout
        assert time.perf_counter() - begin < 20  # under a second on an idle machine; this bound is for a busy one


def test_the_last_line_names_the_result_and_the_directory(tmp_path):
    ended = run_cli(*TINY_PRETRAIN, "task.max_steps=2", f"output_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert ended.stdout.splitlines()[-1] == f"val_loss {summary['val_loss']:.4f}  run"
    assert "task=finetune init=run" in ended.stdout
    assert "step 2/2" in ended.stderr and "\x1b" not in ended.stderr  # plain lines when piped


def test_a_finished_run_is_not_run_again(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    ended = run_cli(*TINY_PRETRAIN, f"output_dir={finished}")
    assert ended.returncode == 0 and "finished already" in ended.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resume_takes_the_saved_config(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    whole = checkpoint.checkpoints_of(run)[-1]
    shutil.rmtree(whole)
    ended = run_cli(f"resume={run}", "data.num_workers=1")
    assert ended.returncode == 0, ended.stderr
    assert (run / "summary.json").exists() and "data.num_workers=1" in (run / "overrides.yaml").read_text()


def test_dry_run_builds_nothing_on_disk(tmp_path):
    before = set(tmp_path.rglob("*"))
    ended = run_cli("dry_run=true", "model=vit_huge", "data=imagenet", "launcher.processes=8", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "657,074,508" in ended.stdout and "4096 = micro batch 512 x accumulation 1 x devices 8" in ended.stdout
    assert "250,400 (313 an epoch of 1,281,167 images)" in ended.stdout
    assert set(tmp_path.rglob("*")) == before


def test_dry_run_of_a_pipeline_names_its_stages():
    text = dry_run.report(composed("task=pipeline", "dry_run=true", "output_dir=x"))
    rows = dict(line.split("  ", 1) for line in text.splitlines())
    assert list(rows) == ["run", "pretrain", "linprobe", "finetune", "all stages", "writes to"]
    assert all("steps, about" in rows[stage] for stage in ("pretrain", "linprobe", "finetune"))
    assert rows["writes to"].strip() == "x" and "of training, computed" in rows["all stages"]
    assert "knn         no training" in dry_run.report(composed("task=pipeline", "task.stages=[pretrain,knn]"))


def test_dry_run_of_a_sweep_adds_up_its_members_and_leaves_nothing_behind(tmp_path):
    words = ["task.epochs=2,3", "estimate.tflops=0.001", "dry_run=true", "device=cpu"]
    ended = run_cli("-m", *words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    minutes = [float(each) for each in re.findall(r"time +about ([\d.]+) minutes", ended.stdout)]
    total = re.search(r"^2 members: about ([\d.]+) minutes of training, one after another$", ended.stdout, re.M)
    assert len(minutes) == 2 and total and float(total[1]) == pytest.approx(sum(minutes), rel=0.01)
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


def test_dry_run_tells_time_and_cost():
    ended = run_cli(
        *("dry_run=true", "model=vit_base", "data=imagenet", "launcher.processes=8", "estimate.tflops=312"),
        *("estimate.cost_per_hour=2", "device=cpu", "task.precision=fp32"),
    )
    rows = dict(line.split("  ", 1) for line in ended.stdout.splitlines() if "  " in line)
    # 57.16 GFLOPs x 1,281,167 x 800 epochs / (8 x 312e12 x .35)
    assert "about 18.6 hours, computed: 312 TFLOP/s a device (given) x 35% x 8" in rows["time"], ended
    assert "149.1 device hours at 2" in rows["cost"]
    from mae.tools import dry_run

    fast = composed("dry_run=true", "estimate.tflops=1000", "estimate.loader_images_per_second=288", "device=cpu")
    assert "the loader's 288 images/s hold the devices back" in dry_run.report(fast)
    here = dry_run.report(composed("dry_run=true", "device=cpu"))
    assert "measured on this cpu" in here and "cost" not in here
    ended = run_cli("dry_run=true", "estimate.utilisation=35")
    assert ended.returncode == 1 and "estimate.utilisation must lie in (0, 1], got 35" in ended.stderr


def planned(*overrides: str) -> dict[str, str]:
    """Rows of a plan for data that is not there."""
    given = ("dry_run=true", "data=imagenet", "device=cpu", "estimate.tflops=1", *overrides)
    return dict(line.split("  ", 1) for line in dry_run.report(composed(*given)).splitlines())


def test_dry_run_counts_the_part_of_absent_data_that_is_asked_for():
    assert "of 12,812 images" in planned("data.fraction=0.01")["steps"]
    assert "of 10,000 images" in planned("data.per_class=10", "task=finetune", "task.drop_last=false")["steps"]
    assert (
        "of 12,812 images"
        in planned("data.per_class=100", "data.fraction=0.01", "task=finetune", "task.drop_last=false")["steps"]
    )


def test_dry_run_knows_what_ways_of_training_save_and_cost():
    def of(row: str, *overrides: str) -> float:
        found = re.search(r"([\d.]+) in training" if row == "GFLOPs an image" else r"optimizer ([\d.]+)",
                          planned("task=finetune", "model=vit_base", *overrides)[row])  # fmt: skip
        assert found is not None
        return float(found[1])

    work, memory = of("GFLOPs an image"), of("memory a device")
    assert of("GFLOPs an image", "task.checkpointing=blocks") == pytest.approx(work * 4 / 3, rel=1e-3)
    assert of("GFLOPs an image", "task.finetune_blocks=6") == pytest.approx(work * 2 / 3, rel=1e-3)
    assert of("GFLOPs an image", "task.patch_drop=0.5") < 0.52 * work
    assert of("memory a device", "task.ema_decay=0.999") == pytest.approx(memory * 5 / 4, rel=0.02)
    two = ("launcher.processes=2", "task.batch_size=512")
    assert of("memory a device", *two, "launcher.sharding=full") == pytest.approx(memory / 2, rel=0.02)
    assert "(auto: the largest that fits)" in planned("task.micro_batch_size=auto")["effective batch"]


def test_dry_run_counts_the_head_of_a_segmenter_and_no_backward_pass_of_a_frozen_encoder():
    scenes = ["data=ade20k", "task=segment", "model=vit_tiny", "model.img_size=64"]
    flops = {}
    for name, more in {"linear": [], "upernet": ["task.head=upernet"], "frozen": ["task.frozen=true"]}.items():
        cfg = composed(*scenes, *more, "init=unused", "dry_run=true", "device=cpu", "estimate.tflops=1")
        forward, flops[name] = operations(cfg, model_on_meta(cfg))
        model = model_on_meta(cfg).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 64, 64, device="meta"))
        assert forward.total == counter.get_total_flops() and forward.decoder > 0
        backward = forward.decoder if name == "frozen" else forward.total
        assert flops[name] == forward.total + 2 * backward
    assert flops["frozen"] < flops["linear"] < flops["upernet"] / 2


def test_dry_run_of_cached_features_encodes_each_image_once():
    probe = ["task=linprobe", "init=unused", "model=vit_tiny"]
    cached = planned(*probe, "task.cached_features=true")
    assert "9.56 days" in planned(*probe)["time"] and "2.55 hours" in cached["time"]  # 90 epochs and one
    assert cached["checkpoints"].strip().startswith("one at the end") and "for 256 images" in cached["memory a device"]


def test_dry_run_has_the_memory_of_the_costliest_size_and_number_format():
    def activations(*overrides: str) -> float:
        memory = planned("model=vit_tiny", "task.micro_batch_size=64", *overrides)["memory a device"]
        return float(re.findall(r"activations ([\d.]+)", memory)[0])

    plain = activations("task.precision=fp32")
    assert activations("task.precision=fp64") == pytest.approx(2 * plain, rel=0.05)
    early = activations("task.precision=fp32", "task.img_size_schedule=[[0,224,0.25],[9,224]]")
    assert early == activations("task.precision=fp32", "task.mask_ratio=0.25") > plain
    frozen = activations("task=linprobe", "init=unused", "task.precision=fp32")
    assert frozen > 64 * 3 * 224 * 224 * 4 / 1e9  # the images alone


def test_dry_run_without_the_data_asks_for_the_number_of_classes():
    absent = ["data=folder", "data.root=/absent", "data.train_images=1000", "data.per_class=5"]
    with pytest.raises(UserError, match="not here needs their data.num_classes: set it too"):
        planned(*absent)
    assert "of 50 images" in planned(*absent, "data.num_classes=10", "task.drop_last=false")["steps"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_dry_run_plans_for_a_gpu_that_is_elsewhere():
    rows = planned("device=cuda")
    assert rows["number format"].strip() == "bfloat16" and "1 TFLOP/s a device (given)" in rows["time"]
    with pytest.raises(
        ValueError, match=r"finds 0 GPUs.*To plan for one elsewhere, give its rate: estimate.tflops=300"
    ):
        planned("device=cuda", "estimate.tflops=null")


def test_dry_run_does_not_count_a_machine_twice_that_processes_share(monkeypatch):
    monkeypatch.setattr(cost, "matrix_rate", lambda *_: 1e12)
    assert "x 35% x 1:" in planned("estimate.tflops=null", "launcher.processes=8")["time"]
    assert "x 35% x 8:" in planned("launcher.processes=8")["time"]


def test_dry_run_agrees_with_the_model_and_with_measured_flops():
    cfg = composed("model=vit_huge", "data=imagenet", "dry_run=true")
    model = model_on_meta(cfg)
    assert sum(parameters(model)) == 657_074_508
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"), 0.75, torch.empty(1, 256, device="meta"))
    assert forward_flops(model, 0.75).total == counter.get_total_flops()


def test_checkpoints_are_listed(finished):
    ended = subprocess.run(
        [sys.executable, "-m", "mae.checkpoint", str(finished)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    path = checkpoint.checkpoints_of(finished)[-1]
    digest = checkpoint.weights_digest(checkpoint.read_weights(path))
    assert ended.stdout.splitlines()[-1].split() == ["10", "2.00", ended.stdout.split()[-3], "yes", digest]


def test_a_checkpoint_that_the_run_removes_while_they_are_listed_is_left_out(tmp_path, capsys, monkeypatch):
    assert run_here(tmp_path, *TINY_PRETRAIN, "task.max_steps=4", "checkpoint.every_epochs=0.2") == 0
    first, second = checkpoint.checkpoints_of(tmp_path)[-2:]
    read = checkpoint.read_weights

    def removing(path):
        shutil.rmtree(first, ignore_errors=True)
        return read(path)

    monkeypatch.setattr(checkpoint, "read_weights", removing)
    capsys.readouterr()  # of the run
    assert checkpoint.main([str(tmp_path)]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]] == [str(checkpoints.step_of(second))]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_s_run_learns_in_time(tmp_path):
    begin = time.perf_counter()
    ended = run_cli(cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
    assert ended.returncode == 0, ended.stderr
    (run,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    flat = next(row["val/loss_of_patch_mean"] for row in rows if "val/loss_of_patch_mean" in row)
    assert summary["val_loss"] < flat / 2
    assert Image.open(sorted((run / "images").glob("*.png"))[-1]).size[0] > 400
    logging.getLogger(__name__).info("%.0f s, val_loss %.4f", time.perf_counter() - begin, summary["val_loss"])


def test_a_sweep_refuses_a_member_before_it_runs_the_others(tmp_path):
    ended = run_cli(
        "-m", *TINY_PRETRAIN, "task.max_steps=1", "task.mask_ratio=0.5,0.999", f"hydra.sweep.dir={tmp_path / 's'}"
    )
    assert ended.returncode == 1
    assert (tmp_path / "s" / "mask_ratio_0.5" / "summary.json").exists()
    refused, ran = (
        ended.stderr.index(text)
        for text in (
            "member mask_ratio_0.999 is refused: task.mask_ratio=0.999 keeps 0 of the 16 patches",
            "member 1 of 1: mask_ratio_0.5",
        )
    )
    assert refused < ran and "Traceback" not in ended.stderr
    assert ended.stdout.splitlines()[-1] == "Refused, see above: mask_ratio_0.999."
    assert not (tmp_path / "s" / "mask_ratio_0.999").exists()


def test_a_sweep_refuses_a_pipeline_whose_stage_cannot_run_and_a_start_that_is_missing(tmp_path):
    stages = 'task.overrides.pretrain=["task.epochs=1"]'
    ended = run_cli("-m", "task=pipeline", "task.stages=[pretrain,knn]", stages, "seed=0,1", cwd=tmp_path)
    sentence = "stage pretrain: task.warmup_epochs=2 is longer than task.epochs=1"
    assert ended.returncode == 1 and ended.stderr.count(sentence) == 2 and "member 1 of" not in ended.stderr
    ended = run_cli("-m", "task=linprobe", "seed=0,1", cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr.count("is refused: task=linprobe needs init") == 2


def test_a_sweep_whose_members_are_all_refused_shows_no_earlier_result(tmp_path):
    shutil.copytree(ROOT / "tests" / "runs", tmp_path / "s")  # of an earlier command
    ended = run_cli("-m", *TINY_PRETRAIN, "task.mask_ratio=1.5,2.5", f"hydra.sweep.dir={tmp_path / 's'}")
    assert ended.returncode == 1 and ended.stdout == ""
    assert [line.split(":")[0] for line in ended.stderr.splitlines()] == [
        "member mask_ratio_1.5 is refused",
        "member mask_ratio_2.5 is refused",
    ]


# ---------------------------------------------------------------- bad ones


def in_plain_words(ended: subprocess.CompletedProcess[str], message: str) -> None:
    """Not zero, the sentence, and no traceback."""
    assert ended.returncode != 0
    assert message in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    said = [line for line in ended.stderr.splitlines() if line.strip() and "step" not in line]
    assert len(said) <= 2, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("task.mask_ration=0.5", "task.mask_ration is not a key of the configuration. Did you mean mask_ratio?"),
        ("+task.speed=1", "task.speed is not a key of the configuration."),
        ("tsk=pretrain", "tsk is not a key of the configuration. Did you mean task?"),
        ("model=vit_bse", "model=vit_bse does not exist. Did you mean vit_base?"),
        ("task=pretrian", "Did you mean pretrain?"),
        ("task.mask_ratio=1.5", "task.mask_ratio must lie in (0, 1), got 1.5."),
        ("task.epochs", "The override 'task.epochs' cannot be read"),
        ("task.mask_ratio=[0.5", "The override 'task.mask_ratio=[0.5' cannot be read"),
        ("data=folder", "data.root is not set: give the directory of the images"),
        ("data=folder data.root=/no/such", "data.root=/no/such does not exist"),
        ("data=cifar10 data.root=/no/such", "give the directory of the images, or set data.download=true."),
        ("task=linprobe task.learning_rates=[1]", "task.learning_rates needs task.cached_features=true: otherwise set"),
        ("resume=/no/such", "/no/such is not the directory of a run: it holds no config.yaml."),
        ("output_dir=/proc/here", "/proc/here cannot be written to"),
        ("task.batch_size=100 task.micro_batch_size=7", "the nearest that do: 98 or 105."),
        (
            "model=vit_huge",
            "model.img_size=32 is not a multiple of model.patch_size=14: the nearest that are: 28 or 42.",
        ),
    ],
    ids=lambda v: v if "." in v or "=" in v else "",
)
def test_bad_command_lines_are_refused_before_torch(arguments, message):
    in_plain_words(run_cli(*arguments.split()), message)


def photos(folder: Path, count: int, size: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


FOLDER = [*TINY_PRETRAIN, "data=folder", "data.img_size=16", "data.num_workers=0", "data.fraction=1.0"]


def fails_here(tmp_path: Path, *overrides: str) -> str:
    """The sentence that a run in this process ends with."""
    with pytest.raises(ValueError) as caught:
        run_here(tmp_path / "run", *overrides)
    text = str(caught.value)
    assert len(text.splitlines()) <= 4
    return text


def test_an_empty_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    assert "no image lies under" in fails_here(tmp_path, *FOLDER, f"data.root={tmp_path / 'photos'}")


def test_a_folder_of_one_image(tmp_path):
    text = fails_here(tmp_path, *FOLDER, f"data.root={photos(tmp_path / 'photos', 1)}")
    assert "data.root" in text and ("one image" in text or "1 image" in text)


def test_a_folder_that_may_not_be_read():
    """As root too, which reads everything: it becomes another user for the moment."""
    with tempfile.TemporaryDirectory() as name:
        place, me = Path(name), os.geteuid()
        root, run = photos(place / "photos", 3), place / "run"
        run.mkdir()
        place.chmod(0o755)
        run.chmod(0o777)
        assert run_here(place / "before", *TINY_PRETRAIN, "task.max_steps=1") == 0  # all is imported from here on
        cfg = composed(*FOLDER, f"data.root={root}", f"output_dir={run}")
        root.chmod(0)
        try:
            if me == 0:
                os.seteuid(65534)  # nobody
            with pytest.raises(ValueError, match="data.root") as caught:
                launch.launch(cfg, [])
        finally:
            os.seteuid(me)
            root.chmod(0o755)
        assert "cannot be read: Permission denied" in str(caught.value)


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "data.root" in fails_here(tmp_path, *FOLDER, f"data.root={tmp_path / 'file'}")


def test_too_few_images_for_a_batch(tmp_path):
    root = photos(tmp_path / "photos", 12)
    text = fails_here(tmp_path, *FOLDER, f"data.root={root}", "task.drop_last=true")
    assert "task.batch_size=32" in text


def test_a_directory_with_another_config_lists_the_differences_and_is_left_alone(finished):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    ended = run_cli(*TINY_PRETRAIN, "task.mask_ratio=0.5", "optimizer.base_lr=1e-3", f"output_dir={finished}")
    assert ended.returncode == 1 and "holds a run of another config" in ended.stderr
    assert "task.mask_ratio: 0.75 -> 0.5" in ended.stderr and "optimizer.base_lr: 0.012 -> 0.001" in ended.stderr
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_resume_with_another_number_is_refused(finished):
    in_plain_words(
        run_cli(f"resume={finished}", "task.epochs=9"), "task.epochs cannot be changed together with resume="
    )


def test_resume_of_a_spoiled_config(tmp_path):
    (tmp_path / "config.yaml").write_text("task: [")
    in_plain_words(run_cli(f"resume={tmp_path}"), "config.yaml cannot be read as YAML")


def test_an_output_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("keep me")
    in_plain_words(run_cli(f"output_dir={tmp_path / 'file'}"), "cannot be written to")
    assert (tmp_path / "file").read_text() == "keep me"


def mounted(tmp_path: Path, options: str) -> Path:
    """A small file system of its own; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")
    return place


def test_a_read_only_disk(tmp_path):
    place = mounted(tmp_path, "size=1m,ro")
    try:
        in_plain_words(run_cli(f"output_dir={place / 'run'}"), "cannot be written to (Read-only file system)")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_keeps_what_was_saved(tmp_path):
    place = mounted(tmp_path, "size=1m")
    try:
        often = [*TINY_PRETRAIN, "checkpoint.every_epochs=0.2", "checkpoint.keep=100", f"output_dir={place / 'run'}"]
        in_plain_words(run_cli(*often), "The disk is full. What was saved before is whole")
        kept = checkpoint.checkpoints_of(place / "run")
        assert kept and all(checkpoint.verify(path) for path in kept)
        assert not list((place / "run" / "checkpoints").glob(".step*"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    in_plain_words(run_cli(*TINY_PRETRAIN, "device=cuda", f"output_dir={tmp_path}"), "finds 0 GPUs. Use device=cpu")
