"""What a command takes over from the run that init= names."""

import csv
import json
import shutil

import pytest
from conftest import TINY_PRETRAIN, composed, run_cli, run_here
from hydra import compose, initialize_config_dir
from test_tasks import TINY_FINETUNE, folder_of

from mae import launch
from mae.compose import CONF
from mae.compose import composed as plain
from mae.config import ConfigError
from mae.inherit import inherited, run_of, stands_for


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("data") / "set", {"ant": 20, "bee": 20, "cat": 20})


@pytest.fixture(scope="module")
def parent(root, tmp_path_factory):
    """A fine-tuned run of its own sizes on its own data."""
    run = tmp_path_factory.mktemp("parent") / "run"
    given = ["data=folder", f"data.root={root}", "data.fraction=1.0", "data.num_workers=0", "data.mean=[0.1,0.2,0.3]"]
    assert run_here(run, *TINY_FINETUNE, *given, "task.max_steps=1", "task.mixup=0", "task.cutmix=0") == 0
    return run


def taken(*overrides):
    """What a command line comes to."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return inherited(compose("config", list(overrides)), overrides, plain)


def test_model_and_data_are_those_of_the_run(parent, root, capsys):
    for init in (
        parent,
        parent / "checkpoints" / "step_00000001",
        *parent.glob("checkpoints/step_*/model.safetensors"),
    ):
        cfg = taken("task=evaluate", f"init={init}")
        assert (cfg.model.embed_dim, cfg.model.depth, cfg.model.img_size) == (32, 2, 16)
        assert (cfg.data.name, cfg.data.root, cfg.data.mean) == ("folder", str(root), [0.1, 0.2, 0.3])
        assert f"init={init}: model=vit_nano and data=folder are that run's\n" in capsys.readouterr().err


def test_what_the_command_line_says_wins(parent, root, capsys):
    cfg = taken("task=evaluate", f"init={parent}", "model.depth=3", "data.root=/other", "+data.extra=1")
    assert (cfg.model.depth, cfg.model.embed_dim, cfg.data.name, cfg.data.root) == (3, 32, "folder", "/other")
    cfg = taken("task=finetune", f"init={parent}", "data=cifar100", "data.root=/other")
    assert (cfg.data.name, cfg.data.mean[0], cfg.model.embed_dim) == ("cifar100", 0.5071, 32)
    assert cfg.model.img_size == cfg.data.img_size == 32  # which follows the data, as everywhere
    assert "model=vit_nano is that run's" in capsys.readouterr().err
    assert taken("task=finetune", f"init={parent}", "data.img_size=24").model.img_size == 24
    cfg = taken("task=finetune", f"init={parent}", "model=vit_tiny")
    assert (cfg.model.embed_dim, cfg.model.img_size, cfg.data.name) == (192, 16, "folder")
    cfg = taken("experiment=paper_finetune_vit_base", f"init={parent}")
    assert (cfg.model.name, cfg.data.name, cfg.data.root) == ("vit_base", "imagenet", None)


def test_the_recipe_is_that_of_the_run_s_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("model: {name: vit_large, depth: 24}\ndata: {name: imagenet}\n")
    found = taken("task=finetune", f"init={tmp_path}")
    found.init = None
    assert found == taken("task=finetune", "model=vit_large", "data=imagenet") and found.optimizer.layer_decay == 0.75


def test_files_that_are_no_run_s_and_runs_of_other_groups_bring_nothing(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {name: gone}\ndata: {name: digits}\n")
    (tmp_path / "model.pth").write_bytes(b"")
    assert run_of(str(tmp_path / "model.pth")) is None and taken(f"init={tmp_path}/model.pth").model.name == "vit_nano"
    (tmp_path / "checkpoints").mkdir()
    assert run_of(str(tmp_path)) == tmp_path and taken(f"init={tmp_path}").model.name == "vit_nano"
    assert not capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("[")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read as YAML"):
        taken(f"init={tmp_path}")


def test_the_printed_next_command_evaluates_on_the_run_s_data(parent, tmp_path):
    told = run_cli(
        "task=evaluate", f"init={parent}", "task.batch_size=8", f"output_dir={tmp_path / 'run'}", cwd=tmp_path
    )
    assert told.returncode == 0, told.stderr
    rows = list(csv.DictReader((tmp_path / "run" / "predictions.csv").read_text().splitlines()))
    assert {row["label"] for row in rows} == {"ant", "bee", "cat"} and len(rows) == 6
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["checkpoint"].endswith("/step_00000001")


def test_a_result_of_an_earlier_checkpoint_says_so(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "knn"
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=1") == 0
    command = [*(one for one in TINY_PRETRAIN if one.startswith(("model", "data", "device"))), "task=knn", "task.k=[3]"]
    assert run_here(out, *command, f"init={run}") == 0
    assert run_here(out, *command, f"init={run}") == 0
    assert capsys.readouterr().err.endswith("another seed= or output_dir= starts a new one.\n")
    shutil.copytree(run / "checkpoints" / "step_00000001", run / "checkpoints" / "step_00000002")  # it has gone on
    (run / "checkpoints" / "best").symlink_to("step_00000002")
    assert stands_for(str(run / "checkpoints" / "best")) == (run / "checkpoints" / "step_00000002").resolve()
    cfg = composed(*command, f"init={run}", f"output_dir={out}")
    assert launch.launch(cfg, command) == 0
    said = f" It read step_00000001, and init={run} stands for step_00000002 now: init={run}/checkpoints/step_00000002"
    assert f"{said} takes that.\n" in capsys.readouterr().err
