"""Runs outlive versions: a saved config is read with today's keys."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY_PRETRAIN, composed, run_cli, run_here
from omegaconf import OmegaConf

from mae.config import versions
from mae.config.check import check_config, to_dict, with_values
from mae.config.identity import difference, identity
from mae.config.saved import WARNED, read_config, stored_config
from mae.errors import UserError
from mae.launch import prepare
from mae.runs import layout


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """An interrupted run whose config lacks keys and a group of today, and holds some that no longer exist."""
    run = tmp_path_factory.mktemp("earlier") / "run"
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=2") == 0
    (run / "summary.json").unlink()
    values = to_dict(stored_config(run))
    del values["task"]["eval_mask_ratios"], values["model"]["in_chans"], values["tensorboard"], values["estimate"]
    values["task"]["colour"] = 3
    values["palette"] = {"name": "warm"}
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return run


FILLED = "config.yaml lacks estimate, model.in_chans, task.eval_mask_ratios, tensorboard: today's defaults are taken."
DROPPED = "config.yaml holds task.colour, palette, which this version does not know and passes over."


def test_missing_keys_are_filled_and_strange_ones_passed_over_in_a_sentence(earlier, caplog):
    WARNED.clear()
    cfg = read_config(earlier)
    again = read_config(earlier)
    today = composed(*TINY_PRETRAIN, "task.max_steps=2", f"output_dir={earlier}")
    assert cfg == again == today and difference(cfg, today) == []
    assert cfg.model.in_chans == 3  # ${data.in_chans}, of the run's own data
    assert [record.message.replace(f"{earlier}/", "") for record in caplog.records] == [
        FILLED,
        DROPPED,
    ]


def test_a_run_of_an_earlier_version_goes_on_and_is_reported(earlier, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(earlier, run)
    ended = run_cli(f"resume={run}")
    assert ended.returncode == 0, ended.stderr
    assert FILLED in ended.stderr and DROPPED in ended.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert to_dict(stored_config(run))["model"]["in_chans"] == 3


def test_a_value_of_another_kind_is_refused_with_its_key(earlier, tmp_path):
    values = to_dict(stored_config(earlier))
    values["task"]["epochs"] = "many"
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    with pytest.raises(UserError, match=r"task\.epochs must be a number, got 'many'"):
        read_config(tmp_path)


def test_reading_a_run_asks_nothing_of_its_data_or_of_today_s_rules(tmp_path, monkeypatch):
    cfg = composed("data=folder", f"data.root={tmp_path}")
    stored = with_values(cfg, data={**cfg.data, "root": "/nowhere/at/all"})
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(stored))
    monkeypatch.setenv("WORLD_SIZE", "7")  # which does not divide the batch
    assert read_config(tmp_path) == stored
    with pytest.raises(UserError, match=r"data\.root=/nowhere/at/all does not exist"):
        check_config(stored)


# ---------------------------------------------------------------- format numbers and migrations


def write(run: Path, values: dict) -> Path:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return run


def test_a_saved_config_has_a_format_number_that_is_no_part_of_the_run(tmp_path):
    cfg = composed(*TINY_PRETRAIN, f"output_dir={tmp_path}")
    run = prepare.prepare(cfg, [])
    assert stored_config(run).format == layout.FORMAT == 1
    assert read_config(run) == cfg and "format" not in identity(read_config(run))
    assert prepare.prepare(cfg, []) == run  # the same run
    values = to_dict(stored_config(run))
    del values["format"]  # of an earlier version
    write(run, values)
    assert difference(read_config(run), cfg) == [] and prepare.prepare(cfg, []) == run


def test_keys_that_came_later_have_the_value_of_earlier_versions_and_are_named(tmp_path, caplog):
    values = to_dict(composed("data=folder", f"data.root={tmp_path}", "data.splits=off"))
    del values["data"]["splits"]
    assert read_config(write(tmp_path / "run", values)).data.splits == "auto"
    assert "config.yaml lacks data.splits: read as earlier versions did." in caplog.text
    caplog.clear()
    WARNED.clear()
    write(tmp_path / "run", values | {"format": 1})  # which would have it
    assert read_config(tmp_path / "run").data.splits == "auto"
    assert "config.yaml lacks data.splits: today's defaults are taken." in caplog.text


def test_groups_and_keys_are_renamed_by_a_migration(tmp_path, monkeypatch):
    migration = versions.Migration(
        format=2,
        renamed={"optimiser": "optimizer", "optimizer.lr": "optimizer.base_lr", "task.image_size": "model.img_size"},
        added={"task=pretrain": {"norm_pix_loss": True}},
    )
    monkeypatch.setattr(versions, "MIGRATIONS", (*versions.MIGRATIONS, migration))
    cfg = composed(*TINY_PRETRAIN, "optimizer.base_lr=0.5", "model.img_size=8")
    values = to_dict(cfg)
    values["optimiser"] = values.pop("optimizer")
    values["optimiser"]["lr"] = values["optimiser"].pop("base_lr")
    values["task"]["image_size"] = values["model"].pop("img_size")
    del values["task"]["norm_pix_loss"]
    assert read_config(write(tmp_path / "old", values | {"format": 1})) == cfg
    changed = versions.as_of_today(values | {"format": 2}, [])[1]  # whose names would be mistakes
    assert "optimizer" in changed.defaults and "optimiser" in changed.unknown
    assert "task.norm_pix_loss" not in identity(cfg)  # another value than that of earlier versions counts alone


def test_a_format_of_a_newer_version_is_warned_about(tmp_path, caplog):
    WARNED.clear()
    cfg = composed(*TINY_PRETRAIN)
    assert read_config(write(tmp_path / "run", to_dict(cfg) | {"format": 7})) == cfg
    (record,) = caplog.records
    sentence = "is of format 7, from a newer version of this program; this one reads up to 1."
    assert record.message == f"{tmp_path / 'run' / 'config.yaml'} {sentence}"
