"""Sweeps over named members, intervals of one seed, and table 1 laid out as the paper does."""

import json
import re
from pathlib import Path

import pytest
import yaml
from browser import Browser, needs_browser
from conftest import ROOT, TINY, composed, run_cli
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from mae.config import sweep_members, sweep_names
from mae.config.check import check_config, resolve
from mae.errors import UserError
from mae.launch.pipeline import stage_configs
from mae.launch.prepare import prepare
from mae.report import sweep, sweep_figure, table1
from mae.report.intervals import SEEDS_SENTENCE, interval, verdict
from mae.report.members import Member, Sweep, Value, images_of, read_sweep
from mae.report.paper_results import PUBLISHED
from mae.report.record import Record

FILES = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))


def raw(*overrides: str) -> DictConfig:
    """What a command line composes to, members included."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


def chosen(*overrides: str) -> tuple[DictConfig, list[str]]:
    """The checked config and the command line of a member."""
    cfg, command = sweep_members.with_member(raw(*overrides), overrides)
    return check_config(resolve(cfg)), command


# ---------------------------------------------------------------- members


def test_a_member_s_overrides_win_over_the_rest_of_the_command_line():
    cfg, command = chosen("member=block_0.5", "+sweeps=masking", "task.mask_ratio=0.9", "masking=grid", "seed=3")
    assert (cfg.masking.name, cfg.task.mask_ratio, cfg.task.name, cfg.seed) == ("block", 0.5, "pipeline", 3)
    assert command == ["member=block_0.5", "+sweeps=masking", "seed=3", "masking=block", "task.mask_ratio=0.5"]
    assert chosen(*command) == (cfg, command)  # what overrides.yaml holds is the same run


def test_without_a_member_the_sweep_s_file_is_a_plain_run():
    cfg, command = chosen("+sweeps=masking", "task.mask_ratio=0.9")
    assert cfg.masking.name == "random" and cfg.task.mask_ratio == 0.9
    assert command == ["+sweeps=masking", "task.mask_ratio=0.9"]


def test_a_misspelt_member_is_said():
    with pytest.raises(UserError) as caught:
        chosen("+sweeps=masking", "member=blok")
    assert str(caught.value) == (
        "member=blok is none of the members of masking: choose one of random, block_0.5, block, grid, uniform, green. "
        "Did you mean block?"
    )


def test_members_are_named_by_themselves_and_groups_by_their_choice():
    name = sweep_names.member_name
    assert name(["member"], ["member=block_0.5", "+sweeps=masking"]) == "block_0.5"
    assert name(["member", "seed"], ["member=grid", "seed=1"]) == "grid-seed_1"
    assert name(["masking", "task.mask_ratio"], ["masking=block", "task.mask_ratio=0.6"]) == (
        "masking_block-mask_ratio_0.6"
    )
    assert sweep_members.sweep_name(["+sweeps=masking", "seed=1"]) == "masking"
    assert sweep_members.sweep_name(["seed=1"]) == "member"


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_all_members_of_a_sweep_and_their_stages_pass_the_check(name):
    params = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    (key,) = params
    members = sweep_members.listed_values(name, key)
    configs = []
    for value in members:
        cfg, _ = chosen(f"+sweeps={name}", f"{key}={value}")
        configs.append(OmegaConf.to_yaml(cfg))
        if cfg.task.name == "pipeline":
            stage_configs(cfg)
    assert len(set(configs)) == len(members) > 2 or name in ("mask_token", "segment")


# ---------------------------------------------------------------- a pipeline's keys of its first stage


def test_a_pipeline_s_own_keys_reach_its_pre_training_alone(tmp_path):
    from mae.config.build import call
    from mae.launch.pipeline import stage_arguments

    keys = ["task.epochs=5", "task.norm_pix_loss=false", "task.augmentation=none", "task.mask_ratio=0.5"]
    cfg = composed("task=pipeline", *keys, 'task.overrides.pretrain=["task.batch_size=64"]')
    arguments = call(stage_arguments, cfg.task)
    expected = ["task.mask_ratio=0.5", "task.norm_pix_loss=False", "task.epochs=5.0", "augmentation=none"]
    assert arguments == {"pretrain": [*expected, "task.batch_size=64"], "linprobe": [], "finetune": []}
    with pytest.raises(UserError, match="stage pretrain: task.warmup_epochs=2 is longer than task.epochs=1: lower it"):
        stage_configs(composed("task=pipeline", "task.epochs=1"))
    with pytest.raises(UserError, match="task.augmentation is of stage pretrain, which is not among task.stages."):
        stage_configs(composed("task=pipeline", "task.augmentation=none", "task.stages=[knn]", "init=x"))


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("hits", "images", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_wilson_s(hits, images, low, high):
    assert interval(100 * hits / images, images) == pytest.approx((100 * low, 100 * high), abs=0.006)


def member(name: str, images: int | None = None, task: str = "task=linprobe", **results: float) -> Member:
    record = Record("finished", {}, [], [], [])
    counts = {} if images is None else dict.fromkeys(results, images)
    return Member(Path(name), composed(task), record, {"x": name}, dict(results), counts)


def test_the_verdict_names_all_that_the_images_cannot_tell_from_the_best():
    a, b, c = member("a", 359, top1=97.0), member("b", 359, top1=95.0), member("c", 359, top1=80.0)
    limits = f"its interval of 359 images (94.6 to 98.3 %). {SEEDS_SENTENCE}"
    assert verdict(Sweep(Path(), "s", ["x"], [a, b, c])) == f"a is best; b lies within {limits}"
    c.results["top1"] = 96.0
    assert verdict(Sweep(Path(), "s", ["x"], [a, b, c])) == f"a is best; b and c lie within {limits}"
    b.results["top1"] = c.results["top1"] = 50.0
    assert verdict(Sweep(Path(), "s", ["x"], [a, b, c])) == f"a is best; no other member lies within {limits}"
    b.results["top1"] = 97.0
    equal = (
        f"a and b are best; no other member lies within their interval of 359 images (94.6 to 98.3 %). {SEEDS_SENTENCE}"
    )
    assert verdict(Sweep(Path(), "s", ["x"], [a, b, c])) == equal
    assert verdict(Sweep(Path(), "s", ["x"], [a])) is None  # nothing to compare
    assert verdict(Sweep(Path(), "s", ["x", "seed"], [a, b])) is None  # several seeds say more
    assert verdict(Sweep(Path(), "s", ["x"], [member("a", top1=97.0)])) is None  # of an earlier version
    assert verdict(Sweep(Path(), "s", ["x"], [member("a", 359, "task=pretrain", val_loss=0.3)])) is None


def test_members_that_guess_are_not_compared():
    a, b = member("a", 359, top1=12.0), member("b", 359, top1=9.0)
    sentence = verdict(Sweep(Path(), "s", ["x"], [a, b]))
    assert sentence and sentence.startswith(
        "No member has learned: a is best, and 10 %, what guessing among 10 classes"
    )
    a.results["top1"] = 20.0
    assert verdict(Sweep(Path(), "s", ["x"], [a, b])) != sentence


def test_the_best_by_another_result_is_named_where_it_is_another_member():
    a, b = (member(name, 359) for name in "ab")
    a.results |= {"finetune top1": 90.0, "linprobe top1": 50.0, "pretrain val_loss": 0.4}
    b.results |= {"finetune top1": 80.0, "linprobe top1": 60.0, "pretrain val_loss": 0.3}
    assert sweep.other_bests(Sweep(Path(), "s", ["x"], [a, b])) == ["By linprobe top1 b is best: 60.00."]
    b.results["linprobe top1"] = 50.0
    assert sweep.other_bests(Sweep(Path(), "s", ["x"], [a, b])) == []


def test_members_that_have_not_started_are_counted(tmp_path):
    run = prepare(check_config(OmegaConf.merge(composed(), {"output_dir": str(tmp_path / "a")})), ["seed=0"])  # type: ignore[arg-type]
    (tmp_path / "b").mkdir()  # as Hydra makes it, before the first member runs
    text = sweep.finish_sweep(tmp_path)
    assert "2 of 2 members are not finished" in text and "  b: not started" in text and f"  {run.name}: unfin" in text
    assert "b,not started" in (tmp_path / "sweep.csv").read_text()


def test_accuracies_alone_are_of_a_number_of_images():
    stages = {"pretrain": {"val_loss": 0.5}, "finetune": {"top1": 90.0, "val_images": 359}, "knn": {"knn": {"5": 1.0}}}
    assert images_of({"stages": stages}) == {"finetune top1": 359}
    assert images_of({"task": "linprobe", "top1": 90.0, "val_images": 7}) == {"top1": 7}


def test_a_figure_of_one_seed_carries_intervals_and_one_of_several_their_deviation():
    (curve,) = sweep.figure_curves(
        Sweep(Path(), "s", ["x"], [member("a", 100, top1=90.0), member("b", 100, top1=50.0)])
    )
    spread, label = sweep_figure.error_bars(curve, ["a", "b"], [90.0, 50.0])
    assert label == "ours, 95 % interval of 100 images" and spread is not None
    below, above = 90.0 - interval(90.0, 100)[0], interval(90.0, 100)[1] - 90.0
    assert list(spread[:, 0]) == pytest.approx([below, above]) and below > above
    seeds = [member("a", 100, top1=90.0), member("a", 100, top1=94.0)]
    for number, one in enumerate(seeds):
        one.values["seed"] = number
    (curve,) = sweep.figure_curves(Sweep(Path(), "s", ["x", "seed"], seeds))
    spread, label = sweep_figure.error_bars(curve, ["a"], [92.0])
    assert label == "mean of 2 seeds ± deviation" and spread is not None and spread[0, 0] == pytest.approx(8**0.5)


# ---------------------------------------------------------------- published points


def test_published_points_stand_at_the_values_that_are_swept():
    cfg, positions = composed(), sweep_figure.published_positions
    width = PUBLISHED["model.decoder_embed_dim"]["linprobe"]
    ours: dict[Value | None, float] = {float(value): float(value) for value in (12, 24, 48, 72, 96)}
    assert positions(width, ours, True, cfg) == {12: 69.1, 24: 71.3, 48: 73.5, 72: 73.1, 96: 73.1}
    epochs = PUBLISHED["task.epochs"]["finetune"]
    assert positions(epochs, {3.0: 3.0, 44.0: 44.0}, True, cfg) == {11: 85.2, 22: 85.4, 44: 85.7}
    masks = PUBLISHED["masking"]["finetune"]
    assert positions(masks, {"green": 0.0, "grid": 1.0, "random": 2.0}, False, cfg) == {1: 84.0, 2: 84.9}
    blocks = PUBLISHED["task.finetune_blocks"]["finetune"]
    swept: dict[Value | None, float] = {0.0: 0.0, 0.5: 1.0, 1.0: 2.0, 2.0: 3.0, "null": 4.0}
    assert positions(blocks, swept, False, cfg) == {0: 73.5, 1: 79.1, 2: 81.0, 4: 84.9}


# ---------------------------------------------------------------- table 1


def finished(directory: Path, name: str, finetune: float, linprobe: float) -> None:
    """A finished member of table 1, without the training."""
    arguments = [f"member={name}", "+sweeps=table1", "task.stages=[pretrain,linprobe,finetune]"]
    cfg, command = chosen(*arguments)
    cfg = check_config(OmegaConf.merge(cfg, {"output_dir": str(directory / name)}))  # type: ignore[arg-type]
    run = prepare(cfg, command)
    stages = {
        "pretrain": {"epochs": 3.0},
        "finetune": {"top1": finetune, "val_images": 359},
        "linprobe": {"top1": linprobe, "val_images": 359},
    }
    (run / "summary.json").write_text(json.dumps({"task": "pipeline", "steps": 1, "stages": stages}))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """The directory of a part of table 1."""
    directory = tmp_path_factory.mktemp("table1")
    finished(directory, "masking_grid", 90.0, 60.0)
    finished(directory, "default", 95.0, 70.0)
    finished(directory, "decoder_width_1_of_8", 94.0, 61.0)
    sweep.write_sweep(directory)
    return directory


def test_each_row_of_table_1_is_a_member_and_a_published_result():
    assert {name for each in table1.TABLES for name in each.rows} - {"tokens"} == set(
        sweep_members.listed_values("table1", "member")
    )
    for each in table1.TABLES:
        points = PUBLISHED[each.published]["finetune"].points
        assert {value for value, _ in each.rows.values()} == set(points)
        assert points[each.rows["default"][0]] == 84.9


def test_table_1_lays_ours_beside_the_paper_s(table):
    swept = read_sweep(table)
    assert swept.keys == ["table1"] and [m.name for m in swept.members] == [
        "default", "decoder_width_1_of_8", "masking_grid"
    ]  # fmt: skip
    layout = table1.paper_tables(swept)
    assert layout is not None
    rows = {each["letter"]: each["rows"] for each in layout["tables"]}
    assert rows["a"][3] == {
        "text": "8", "default": True, "member": "default", "results": [[95.0, 84.9], [70.0, 73.5]]
    }  # fmt: skip
    assert rows["b"][0]["text"] == "128 (ours 12)" and rows["b"][0]["results"] == [[94.0, 84.9], [61.0, 69.1]]
    assert rows["f"][3]["results"] == [[90.0, 84.0], [60.0, 66.0]]
    assert rows["c"][0]["results"] == [[None, 84.2], [None, 59.6]] and rows["c"][0]["member"] is None
    assert "Ours: vit_nano on digits, pre-trained for 3 epochs. The paper's: ViT-L/16 on ImageNet-1k" in str(
        layout["about"]
    )
    assert "The default's 95 % intervals of 359 images: 92.2 to 96.8 % (ft)" in str(layout["about"])
    assert not (table / "sweep.png").exists() and (table / "sweep.csv").exists()
    assert table1.paper_tables(Sweep(Path(), "s", ["x"], swept.members)) is None


@needs_browser
@pytest.mark.slow
def test_the_page_of_table_1_lives_in_a_browser(table, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(table / "report.html")
        assert browser.console == [] and browser.requests == [] and browser.violations() == []
        text = browser.evaluate("document.querySelector('main').innerText")
        assert browser.evaluate("document.querySelectorAll('.card.paper').length") == 6
        assert browser.evaluate("document.querySelectorAll('tr.default').length") == 6
    assert re.search(r"128 \(ours 12\)\s+94\.0\s+61\.0", text)
    assert "decoder_width_1_of_8 lies within its interval of 359 images" in text


@pytest.mark.slow
def test_a_sweep_over_members_runs_and_is_made_again_from_its_directories(tmp_path):
    small = [one for one in TINY if not one.startswith("task")]
    quick = '["task.batch_size=32","task.epochs=1","task.max_steps=2","task.warmup_epochs=0"]'
    stages = ["task.stages=[pretrain,linprobe]", *(f"task.overrides.{s}={quick}" for s in ("pretrain", "linprobe"))]
    ended = run_cli("-m", "+sweeps=masking", "member=grid,block_0.5", *small, *stages, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    directory = tmp_path / "runs" / "sweep_masking"
    swept = read_sweep(directory)
    assert swept.keys == ["masking"] and [m.name for m in swept.members] == ["block_0.5", "grid"]
    assert swept.members[0].cfg.masking.name == "block" and swept.members[0].cfg.task.mask_ratio == 0.5
    assert "No member has learned: " in ended.stdout  # after two steps
    assert "interval of 359 images" in (directory / "report.html").read_text()
    (directory / "multirun.yaml").unlink()
    again = read_sweep(directory)
    assert again.keys == swept.keys and [m.values for m in again.members] == [m.values for m in swept.members]
