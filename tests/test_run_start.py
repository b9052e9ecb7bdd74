"""How commands enter a run's directory: paths, moved data, resume=, choices of groups, after an early failure."""

import json
import re
import shlex
import shutil

import pytest
from conftest import ROOT, TINY, TINY_PRETRAIN, composed, run_cli, run_here, run_main
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_tasks import folder_of

from mae import cli
from mae.config import paths
from mae.config.check import to_dict, with_values
from mae.config.compose import CONF
from mae.config.from_run import resumed, with_groups, with_run_values, without_taken
from mae.config.saved import read_config, stored_config, stored_overrides
from mae.errors import UserError
from mae.launch import launch
from mae.launch.prepare import prepare
from mae.launch.slurm import status
from mae.report import run as report
from mae.report import sweep

FOLDER = [*TINY_PRETRAIN, "data=folder", "data.num_workers=0", "data.fraction=1.0", "task.max_steps=1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("data") / "set", {"ant": 20, "bee": 20})


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run in a directory whose name must be quoted, on data that it names relative to its working directory."""
    base = tmp_path_factory.mktemp("A")
    shutil.copytree(images, base / "images")
    ended = run_cli(*FOLDER, "data.root=images", "output_dir='lr=1e-3, x'", cwd=base)
    assert ended.returncode == 0, ended.stderr
    return base / "lr=1e-3, x", ended.stdout


def taken(*overrides):
    """What a command line comes to."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return with_run_values(compose("config", with_groups(overrides)), overrides)


# ---------------------------------------------------------------- quoting


def test_a_printed_line_can_be_pasted(trained):
    run, printed = trained
    line = next(line for line in printed.splitlines() if "task=finetune" in line)
    _, _, *arguments = shlex.split(line, comments=True)
    ended = run_cli(*arguments, "--cfg", "job", cwd=run.parent)
    assert ended.returncode == 0 and "model=vit_nano and data=folder are that run's" in ended.stderr
    assert OmegaConf.create(ended.stdout).init == run.name


@pytest.mark.parametrize("quoted", ["'{}'", '"{}"', "escaped"])
def test_the_run_is_recognised_however_its_path_is_quoted(trained, quoted):
    run = str(trained[0])
    argument = re.sub(r"([=, ])", r"\\\1", run) if quoted == "escaped" else quoted.format(run)
    cfg = taken("task=finetune", f"init={argument}")
    assert (cfg.init, cfg.data.name, cfg.model.embed_dim) == (run, "folder", 32)


def test_an_override_that_cannot_be_read_is_shown_as_it_is_typed():
    ended = run_cli("task=knn", "init=runs/lr=1e-3")
    typed = shlex.quote("init='runs/lr=1e-3'")
    assert ended.returncode == 1 and f"with quotes around spaces or = signs, as {typed}." in ended.stderr


def test_status_reads_a_directory_as_it_is_or_quoted(trained):
    run = trained[0]
    assert status.directory_of(f"status={run}") == status.directory_of(f"status='{run}'") == run


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("hydra.run.dir=here", "hydra.run.dir is not the run's directory here: name that as output_dir=DIR."),
        (
            "hydra.sweep.dir=here",
            "hydra.sweep.dir is of a sweep, which -m starts: name a run's directory as output_dir=DIR.",
        ),
    ],
)
def test_directories_of_hydra_that_would_do_nothing_are_refused(argument, message, tmp_path):
    ended = run_cli(argument, cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr == f"{message}\n" and not list(tmp_path.iterdir())


def test_the_flag_of_a_sweep_may_stand_between_overrides():
    ended = run_cli("dry_run=true", "-m", "task=inspect,stats")
    assert ended.returncode == 0 and all(f"{task}: no training." in ended.stdout for task in ("inspect", "stats"))


def test_flags_of_hydra_that_exclude_each_other_are_refused_in_its_own_words():
    ended = run_cli("-m", "--cfg", "job")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Only one of --run, --multirun, --cfg") and "This is a bug" not in ended.stderr


# ---------------------------------------------------------------- paths


def test_paths_are_stored_absolute_and_as_typed(trained, tmp_path, monkeypatch):
    run = trained[0]
    assert read_config(run).data.root == str(run.parent / "images")
    assert paths.read_typed(run) == {"working_directory": str(run.parent), "data.root": "images"}
    shutil.copytree(run.parent / "images", tmp_path / "images")  # another folder of the same name
    monkeypatch.chdir(tmp_path)
    assert taken("task=knn", f"init='{run}'").data.root == str(run.parent / "images")
    monkeypatch.chdir(run.parent)
    cfg = taken("task=knn", f"init='{run}'")
    assert cfg.data.root == "images"  # as typed, so that the name of a run's directory stays as it was


def test_init_and_other_spellings_of_a_path_are_no_difference(tmp_path, monkeypatch, images):
    monkeypatch.chdir(images.parent)
    command = [*FOLDER, f"output_dir={tmp_path / 'run'}"]
    (images.parent / "weights.pth").touch()
    run = prepare(composed(*command, "data.root=set", "init=weights.pth"), command)
    assert read_config(run).init == str(images.parent / "weights.pth")
    (images.parent / "weights.pth").unlink()
    for root, init in (("./set", "weights.pth"), (str(images), "../" + images.parent.name + "/weights.pth")):
        assert prepare(composed(*command, f"data.root={root}", f"init={init}"), command) == run
    with pytest.raises(UserError, match="init: "):
        prepare(composed(*command, "data.root=set", "init=other.pth"), command)


@pytest.mark.parametrize("name", ["timm:vit_base_patch16_224", "hf://a/b"])
def test_names_that_are_no_paths_stay_as_they_are(name):
    cfg = OmegaConf.create(to_dict(composed()))
    cfg.init = name
    stored, typed = paths.with_absolute_paths(cfg)
    assert stored.init == name and "init" not in typed


def test_a_relative_root_of_an_earlier_version_is_located_or_asked_for(tmp_path, images, monkeypatch):
    shutil.copytree(images, tmp_path / "A" / "images")
    shutil.copytree(images, tmp_path / "B" / "images")
    runs = {}
    for name, output in (("by_name", None), ("relative", "out/x"), ("absolute", str(tmp_path / "elsewhere"))):
        run = tmp_path / "A" / ("runs/x" if output is None else output)
        (run / "checkpoints").mkdir(parents=True)
        data = {**composed().data, "name": "folder", "root": "images"}
        stored = with_values(composed(), output_dir=output, data=data)
        (run / "config.yaml").write_text(OmegaConf.to_yaml(stored))
        runs[name] = run
    monkeypatch.chdir(tmp_path / "B")
    for name in ("by_name", "relative"):
        assert taken("task=knn", f"init={runs[name]}").data.root == str(tmp_path / "A" / "images")
    message = r"relative path data\.root=images, and nothing says .*: name it, as data\.root=DIR"
    with pytest.raises(UserError, match=message):
        taken("task=knn", f"init={runs['absolute']}")
    assert taken("task=export", f"init={runs['absolute']}").data.root == "images"  # which reads no image
    assert taken("task=knn", f"init={runs['absolute']}", "data.root=/new").data.root == "/new"
    shutil.rmtree(tmp_path / "A" / "images")
    with pytest.raises(UserError, match=r"it is not in .*A any more: name it"):
        taken("task=knn", f"init={runs['by_name']}")


# ---------------------------------------------------------------- data that moved


def test_a_run_whose_data_moved_is_reported_and_goes_on(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "old")
    run, new = tmp_path / "sweep" / "seed_0", tmp_path / "new"
    assert run_here(run, *FOLDER, f"data.root={tmp_path / 'old'}") == 0
    (tmp_path / "old").rename(new)
    assert report.main([str(run)]) == 0
    assert "Best member" in sweep.finish_sweep(run.parent)
    assert status.status_table(run).splitlines()[1].split()[2] == "FINISHED"
    (run / "summary.json").unlink()
    assert run_here(run, *FOLDER, f"data.root={new}") == 0
    (run / "summary.json").unlink()
    ended = run_cli(f"resume={run}", f"data.root={new}")
    assert ended.returncode == 0 and (run / "summary.json").exists(), ended.stderr
    (run / "summary.json").unlink()
    new.rename(tmp_path / "newer")
    ended = run_cli(f"resume={run}")
    assert ended.returncode == 1 and ended.stderr.startswith(f"data.root={new} does not exist: give the directory")
    assert capsys.readouterr().err.count("Traceback") == 0


# ---------------------------------------------------------------- resume=


def test_resume_keeps_the_directory_and_the_command_line(trained):
    run = trained[0]
    cfg = composed(f"resume='{run}'", "output_dir=/elsewhere")
    with pytest.raises(UserError, match="output_dir=/elsewhere cannot be set together with resume="):
        resumed(cfg, [f"resume='{run}'", "output_dir=/elsewhere"])
    with pytest.raises(UserError, match=r"data\.rooted cannot be changed together with resume="):
        resumed(composed(f"resume='{run}'"), [f"resume='{run}'", "data.rooted=1"])
    typed = [f"resume='{run}'", f"output_dir='{run}'", "data.num_workers=3"]
    cfg, overrides = resumed(composed(*typed), typed)
    assert cfg.data.num_workers == 3 and cfg.output_dir == str(run)
    stored = stored_overrides(run)
    assert overrides == [o for o in stored if o != "data.num_workers=0"] + ["data.num_workers=3"]
    typed = [f"resume='{run}'", "task.compile=off", "device=auto"]
    cfg, overrides = resumed(composed(*typed), typed)
    assert cfg.task.compile == "off" and cfg.device == "auto" and overrides[-2:] == typed[1:]


def test_an_unfinished_run_goes_on_compiled_or_not_and_on_another_device(tmp_path):
    plain = composed(*TINY_PRETRAIN, f"output_dir='{tmp_path}'")
    other = composed(*TINY_PRETRAIN, f"output_dir='{tmp_path}'", "task.compile=blocks", "device=auto")
    assert prepare(plain, []) == prepare(other, []) == tmp_path
    assert read_config(tmp_path).task.compile == "blocks"
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match='task.compile: "blocks" -> "auto"'):
        prepare(plain, [])


# ---------------------------------------------------------------- choices of groups, sweeps


@pytest.mark.slow
def test_a_model_file_with_another_name_in_it_is_taken_as_chosen(tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    text = (ROOT / "conf" / "model" / "vit_nano.yaml").read_text().replace("name: vit_nano", "name: my_vit")
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(text)
    (tmp_path / "conf" / "experiment").mkdir()
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: mine]\n"
    )
    own = ["--config-dir", str(tmp_path / "conf")]
    ended = run_cli(*own, *TINY_PRETRAIN, "experiment=own", "task.max_steps=1", "output_dir=run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert stored_overrides(tmp_path / "run")[-1] == "model=mine"
    ended = run_cli(*own, "task=finetune", "init=run", "--cfg", "job", cwd=tmp_path)
    assert ended.returncode == 0 and "model=mine and data=digits are that run's" in ended.stderr
    stages = [
        "task=pipeline",
        "task.stages=[pretrain,knn]",
        'task.overrides.pretrain=["task.max_steps=1","task.batch_size=32"]',
        'task.overrides.knn=["task.k=[5]"]',
    ]
    ended = run_cli(
        *own, *(o for o in TINY if not o.startswith("task")), *stages, "model=mine", "output_dir=pipe", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert "model=mine" in stored_overrides(tmp_path / "pipe" / "knn")


def member(directory, number, *overrides):
    """A finished member of a sweep, without the training."""
    run = prepare(composed(*TINY_PRETRAIN, *overrides, f"output_dir={directory / str(number)}"), list(overrides))
    (run / "summary.json").write_text(json.dumps({"task": "pretrain", "steps": 1, "val_loss": 1.0 + number}))


@pytest.mark.parametrize(
    ("swept", "values", "shown"),
    [
        ("optimizer.betas", ["[0.9,0.95]", "[0.9,0.999]"], ["[0.9, 0.95]", "[0.9, 0.999]"]),
        ("model.img_size", ["32", "[64,32]"], ["32", "[64, 32]"]),
        ("task.eval_mask_ratios", ["[]", "[0.5]", "[0.5,0.75]"], ["[0.5, 0.75]", "[0.5]", "[]"]),
        ("wandb.group", ["'a,b'", "c", "null"], ["a,b", "c", "null"]),
        ("model", ["vit_nano", "vit_tiny"], ["vit_nano", "vit_tiny"]),
        ("init", ["timm:a", "timm:b"], ["timm:a", "timm:b"]),
    ],
)
def test_a_sweep_over_any_kind_of_value_ends(swept, values, shown, tmp_path):
    for number, value in enumerate(values):
        member(tmp_path, number, *(["data.img_size=32"] if swept == "model" else []), f"{swept}={value}")
    (tmp_path / "multirun.yaml").write_text(
        OmegaConf.to_yaml(
            {"hydra": {"sweeper": {"params": None}, "overrides": {"task": [f"{swept}={','.join(values)}"]}}}
        )
    )
    made = sweep.write_sweep(tmp_path)
    assert [str(m.values[swept]) for m in made.members] == shown
    assert made.best is not None and made.best.name == "0" and (tmp_path / "sweep.png").exists()
    assert sweep.main([str(tmp_path)]) == 0


# ---------------------------------------------------------------- after a failure before the first checkpoint


def test_a_corrected_command_follows_a_start_that_left_nothing(tmp_path, images, capsys):
    run, empty = tmp_path / "run", tmp_path / "empty"
    (empty / "ant").mkdir(parents=True)
    wrong = [*FOLDER, f"data.root={empty}", "data.val_fraction=0.5"]
    with pytest.raises(ValueError, match="no image"):
        run_here(run, *wrong)
    assert (run / "failure.json").exists()
    assert run_here(run, *FOLDER, f"data.root={images}", "task.mask_ratio=0.5") == 0
    assert f"failed before its first checkpoint: it is now in {run / 'failed' / '1'}" in capsys.readouterr().err
    assert read_config(run).task.mask_ratio == 0.5 and not (run / "failure.json").exists()
    assert stored_config(run / "failed" / "1").data.root == str(empty)


@pytest.mark.parametrize("left", ["checkpoints/step_00000001", "summary.json", "metrics.jsonl"])
def test_a_start_that_left_something_keeps_its_directory(tmp_path, left):
    command = [*TINY_PRETRAIN, f"output_dir={tmp_path}"]
    prepare(composed(*command), command)
    (tmp_path / "failure.json").write_text("{}")
    if left.startswith("checkpoints"):
        (tmp_path / left).mkdir()
    else:
        (tmp_path / left).write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="holds a run of another config"):
        launch.prepare(composed(*command, "task.mask_ratio=0.5"), command)


# ---------------------------------------------------------------- groups that a task does not use


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("task=finetune masking=block", "masking=block does nothing with task=finetune: leave it out."),
        ("task=knn init=RUN masking.name=grid", "masking.name=grid does nothing with task=knn: leave it out."),
        ("task=linprobe init=RUN target=hog", "pretrain, visualize, stats, inspect and pipeline use target."),
        ("task=stats masking=block", "pretrain, visualize, inspect and pipeline use masking."),
        ("task=pipeline task.stages=[knn] init=RUN masking=block", "block does nothing with task.stages=[knn]"),
        (
            'task=pipeline task.overrides.finetune=["target=hog"]',
            "target=hog does nothing with stage finetune",
        ),
        ("task=pipeline optimizer.base_lr=1", "optimizer.base_lr=1 belongs to a stage: give it to one, as in"),
        ("task=pipeline init=auto optimizer.base_lr=1", "optimizer.base_lr=1 belongs to a stage"),
        (
            "task=knn init=auto augmentation=finetune",
            "finetune, linprobe, pretrain, inspect and segment use augmentation.",
        ),
        (
            "task=linprobe init=RUN task.cached_features=true augmentation=pretrain",
            "augmentation=pretrain does nothing",
        ),
        ("task=linprobe init=RUN task.cached_features=true data.repeats=2", "with task.cached_features=true, which"),
        ("task=linprobe init=RUN task.cached_features=true task.profile=true", "task.profile=true does nothing with"),
        ("target=pca target.fitted=STATS target.images=9", "target.images=9 does nothing with target.fitted=STATS"),
        ("task=pipeline task.overrides.finetune=true", "task.overrides.finetune must be a list of overrides as"),
        ("task=evaluate init=RUN optimizer.base_lr=1", "optimizer.base_lr=1 does nothing with task=evaluate"),
        (
            'task=pipeline task.stages=[pretrain,knn] task.overrides.knn=["optimizer.lr=1"]',
            "optimizer.lr=1 does nothing with stage knn",
        ),
    ],
)
def test_what_the_task_would_not_use_is_refused(words, message, monkeypatch, capsys):
    assert run_main([*words.split(), "device=cpu", "dry_run=true"], monkeypatch, cli.main) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "masking=block target=hog",
        "task=pipeline masking=block target=hog",
        "task=stats target=pca",
        "task=finetune init=auto masking=block",  # of the pre-training that is made first
        "+sweeps=masking member=block_0.5",
        "task=pipeline data=cifar10_folder data.root=/nowhere",  # nor do the stages of a plan read an image
    ],
)
def test_what_the_task_uses_is_planned(words, monkeypatch, capsys):
    code = run_main([*words.split(), "device=cpu", "dry_run=true"], monkeypatch, cli.main)
    assert code == 0, capsys.readouterr().err


def test_the_plan_of_a_pipeline_has_the_rate_that_is_given_and_its_cost(monkeypatch, capsys):
    words = ["task=pipeline", "device=cuda", "estimate.tflops=300", "estimate.cost_per_hour=2", "dry_run=true"]
    assert run_main(words, monkeypatch, cli.main) == 0
    assert re.search(r"^cost +about \d+\.\d+: \d+\.\d+ device hours at 2$", capsys.readouterr().out, re.M)


def test_an_init_beside_members_with_their_own_is_refused():
    with pytest.raises(UserError, match=r"init=RUN does nothing: each member of segment has an init of its own. Leave"):
        composed("+sweeps=segment", "member=scratch", "init=RUN")


def test_keys_of_the_groups_of_a_resumed_run_can_be_typed(tmp_path):
    command = [*TINY_PRETRAIN, "launcher=slurm", "launcher.nodes=2", f"output_dir={tmp_path / 'run'}"]
    run = prepare(composed(*command), command)
    typed = [f"resume={run}", "launcher.timeout_min=60"]
    assert without_taken(with_groups(typed)) == typed
    launcher = resumed(taken(*typed), typed)[0].launcher
    assert (launcher.name, launcher.nodes, launcher.timeout_min) == ("slurm", 2, 60)
    for missing in (f"resume={tmp_path}", f"replay={tmp_path / 'none'}", f"resume={run},{run}"):
        assert with_groups([missing]) == [missing]


def test_a_key_that_reaches_no_stage_of_a_resumed_pipeline_is_refused(tmp_path, monkeypatch, capsys):
    command = ["task=pipeline", "device=cpu", f"output_dir={tmp_path / 'run'}"]
    run = prepare(composed(*command), command)
    assert run_main([f"resume={run}", "checkpoint.keep=1"], monkeypatch, cli.main) == 1
    assert f"checkpoint.keep=1 does nothing with resume={run}: its stages keep their own." in capsys.readouterr().err
    assert run_main([f"resume={run}", "estimate.utilisation=0.5", "dry_run=true"], monkeypatch, cli.main) == 0


def test_a_resumed_run_waits_for_no_job_of_its_first_start(tmp_path):
    command = [*TINY_PRETRAIN, "launcher=slurm", "launcher.dependency=afterok:12", f"output_dir={tmp_path / 'run'}"]
    run = prepare(composed(*command), command)
    assert read_config(run).launcher.dependency == "afterok:12"
    assert resumed(composed(f"resume={run}"), [f"resume={run}"])[0].launcher.dependency is None


def test_a_target_beside_the_run_that_is_drawn_is_refused(tmp_path, monkeypatch, capsys):
    command = [*TINY_PRETRAIN, "target=hog", "target.cell=2", f"output_dir={tmp_path / 'run'}"]
    run = prepare(composed(*command), command)
    words = ["task=visualize", f"init={run}", "device=cpu", "dry_run=true"]
    assert run_main([*words, "target=pixels"], monkeypatch, cli.main) == 1
    assert f"target=pixels does nothing with task=visualize init={run}: what that run" in capsys.readouterr().err
    assert run_main([*words, "masking=block"], monkeypatch, cli.main) == 0
