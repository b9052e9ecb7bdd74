"""What a command takes over from the run that init= names."""

import csv
import json
import shutil

import pytest
from conftest import TINY_PRETRAIN, composed, run_cli, run_here, run_main
from hydra import compose, initialize_config_dir
from test_tasks import TINY_FINETUNE, folder_of

from mae import cli
from mae.config.check import check_config, resolve
from mae.config.compose import CONF
from mae.config.from_run import run_of, settings_of, stands_for, with_groups, with_run_values, without_taken
from mae.config.identity import identity
from mae.config.saved import read_config, stored_overrides
from mae.config.sweep_members import with_member
from mae.errors import UserError
from mae.launch import launch


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
        return with_run_values(compose("config", with_groups(overrides)), overrides)


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


def test_what_is_recorded_takes_the_run_s_values_again(parent, tmp_path, monkeypatch):
    typed = ["task=knn", f"init={parent}", "task.k=[5]", f"output_dir={tmp_path / 'run'}", "device=cpu"]
    assert run_main(typed, monkeypatch, cli.main) == 0
    recorded = stored_overrides(tmp_path / "run")
    assert recorded == typed
    assert identity(check_config(resolve(taken(*recorded)))) == identity(read_config(tmp_path / "run"))


def test_what_the_command_line_says_wins(parent, root, capsys):
    cfg = taken("task=evaluate", f"init={parent}", "model.depth=3", "data.root=/other", "data.follow_links=true")
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


def test_the_model_that_a_member_of_a_sweep_chooses_wins(parent, root):
    members = ["+members.own=['task.epochs=3']", "+members.small=['model=vit_small','task.mask_ratio=0.5']"]
    arguments = with_groups(["task=pretrain", f"init={parent}", *members])
    for name, depth in {"own": 2, "small": 12}.items():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg, words = with_member(
                compose("config", [*arguments, f"+member={name}"]), [*arguments, f"+member={name}"]
            )
        cfg = with_run_values(cfg, words)
        assert (cfg.model.depth, cfg.data.root) == (depth, str(root))
        assert [word for word in without_taken(words) if word.startswith("model=")] == ["model=vit_small"] * (depth > 2)


def test_the_recipe_is_that_of_the_run_s_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("model: {name: vit_large, depth: 24}\ndata: {name: imagenet}\n")
    found = taken("task=finetune", f"init={tmp_path}")
    found.init = None
    assert found == taken("task=finetune", "model=vit_large", "data=imagenet") and found.optimizer.layer_decay == 0.75


def test_another_set_of_the_same_kind_is_evaluated_at_the_run_s_size(tmp_path):
    run = made(tmp_path / "run", "{name: vit_base, img_size: 64, in_chans: 3}", "{name: imagenet, img_size: 224}")
    cfg = taken("task=evaluate", f"init={run}", "data=imagenet_v2")
    assert (cfg.model.name, cfg.model.img_size, cfg.data.name) == ("vit_base", 64, "imagenet_v2")


def test_how_much_is_learned_from_and_where_is_not_taken_over(tmp_path):
    data = "{name: folder, root: /x, val_fraction: 0.2, fraction: 0.1, per_class: 5, repeats: 4, num_workers: 3, "
    run = made(tmp_path / "run", "{name: vit_base}", data + "cache_dir: /scratch, prefetch: 9}")
    found = taken("task=finetune", f"init={run}").data
    assert (found.root, found.val_fraction) == ("/x", 0.2)
    assert (found.fraction, found.per_class, found.repeats, found.num_workers, found.prefetch) == (
        1.0,
        None,
        1,
        None,
        2,
    )


def test_keys_of_the_run_s_own_data_can_be_given(tmp_path):
    run = made(tmp_path / "run", "{name: vit_base}", "{name: stl10, root: /x, unlabelled: true, mean: [1, 2, 3]}")
    cfg = taken("task=finetune", f"init={run}", "data.unlabelled=true", "data.mean.0=9")
    assert cfg.data.unlabelled and cfg.data.mean[0] == 9
    assert not taken("task=finetune", f"init={run}").data.unlabelled  # labels are wanted


def test_several_parents_of_a_sweep_bring_what_they_agree_on(tmp_path):
    one, two = (made(tmp_path / name, f"{{name: vit_base, depth: {k}}}", "{name: inat, root: /x}")
                for k, name in enumerate(("one", "two"), 5))  # fmt: skip
    given = with_groups(["-m", "task=knn", f"init={one},{two}"])
    assert given == ["-m", "task=knn", f"init={one},{two}", "model=vit_base", "data=inat", "+from_init=model-data"]
    for run, depth in ((one, 5), (two, 6)):
        member = ["task=knn", f"init={run}", *given[3:]]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            assert with_run_values(compose("config", member), member).model.depth == depth
    (two / "config.yaml").write_text("model: {name: vit_large}\ndata: {name: inat}\n")
    assert with_groups(["-m", f"init={one},{two}"]) == ["-m", f"init={one},{two}"]


def made(run, model, data):
    """A directory that looks like a run."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(f"model: {model}\ndata: {data}\n")
    return run


def test_places_of_a_run(tmp_path):
    run = made(tmp_path / "run", "{}", "{}")
    step = run / "checkpoints" / "step_00000004"
    for folder in (step, run / "weights", run / "export" / "timm"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"")
    (run / "checkpoints" / "best").symlink_to(step.name)
    (tmp_path / "link").symlink_to(run / "checkpoints" / "best")
    for place in (run, step, step / "model.safetensors", run / "checkpoints" / "best", tmp_path / "link"):
        assert run_of(str(place)) == run
    for other in (
        "weights/model.safetensors",
        "export/timm",
        "export/timm/model.safetensors",
        "x" * 300,
        "checkpoints",
    ):
        assert run_of(f"{run}/{other}") is None
    assert settings_of("~nosuchuser/x") is None and settings_of(f"{run}/export/timm") is None
    assert run_of("~nosuchuser/x") is None and run_of("timm:vit_base_patch16_224") is None and run_of("/") is None
    assert stands_for(str(run)) is None  # its only checkpoint is not whole
    (step / "manifest.json").write_text('{"files": {"model.safetensors": {"bytes": 0}}}')
    (run / "checkpoints" / "step_00000005").mkdir()
    assert stands_for(str(run)) == step


@pytest.mark.parametrize(
    "model", ["null", "text", "[1]", "{name: 5}", "{name: '${arch}'}", "{name: 'a,b'}", "{depth: 3}"]
)
def test_a_config_of_other_making_brings_nothing(tmp_path, model, capsys):
    run = made(tmp_path / "run", model, "null")
    assert with_groups([f"init={run}"]) == [f"init={run}"] and not capsys.readouterr().err


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    run = made(tmp_path / "run", "[", "")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read as YAML"):
        with_groups([f"init={run}"])


def test_a_group_that_is_not_here_is_named(tmp_path):
    run = made(tmp_path / "run", "{name: mine}", "{name: digits}")
    ended = run_cli("task=knn", f"init={run}", "--cfg", "job")
    assert ended.returncode == 1 and "model=mine does not exist." in ended.stderr
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("defaults: [vit_nano]\nname: mine\n")
    ended = run_cli("task=knn", f"init={run}", f"hydra.searchpath=[file://{tmp_path}/conf]", "--cfg", "job")
    assert ended.returncode == 0 and "name: mine" in ended.stdout


def test_the_printed_next_command_evaluates_on_the_run_s_data(parent, tmp_path):
    ended = run_cli(
        "task=evaluate", f"init={parent}", "task.batch_size=8", f"output_dir={tmp_path / 'run'}", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    rows = list(csv.DictReader((tmp_path / "run" / "predictions.csv").read_text().splitlines()))
    assert {row["label"] for row in rows} == {"ant", "bee", "cat"} and len(rows) == 6
    assert "from_init" not in (tmp_path / "run" / "overrides.yaml").read_text()
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
