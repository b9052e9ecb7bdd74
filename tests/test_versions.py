"""Runs outlive versions: a saved config is read with today's keys."""

import json
import shutil

import pytest
from conftest import TINY_PRETRAIN, composed, run_cli, run_here
from omegaconf import OmegaConf

from mae.config import check
from mae.errors import UserError


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """An interrupted run whose config lacks keys and a group of today, and holds some that no longer exist."""
    run = tmp_path_factory.mktemp("earlier") / "run"
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=2") == 0
    (run / "summary.json").unlink()
    values = check.plain(check.stored(run))
    del values["task"]["eval_mask_ratios"], values["model"]["in_chans"], values["tensorboard"], values["estimate"]
    values["task"]["colour"] = 3
    values["palette"] = {"name": "warm"}
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return run


FILLED = "config.yaml lacks estimate, model.in_chans, task.eval_mask_ratios, tensorboard: today's defaults are taken."
DROPPED = "task.colour, palette no longer exist and are passed over."


def test_missing_keys_are_filled_and_strange_ones_passed_over_in_a_sentence(earlier, caplog):
    check.SAID.clear()
    cfg = check.read(earlier)
    again = check.read(earlier)
    today = composed(*TINY_PRETRAIN, "task.max_steps=2", f"output_dir={earlier}")
    assert cfg == again == today and check.difference(cfg, today) == []
    assert cfg.model.in_chans == 3  # ${data.in_chans}, of the run's own data
    assert [record.message.replace(f"{earlier}/", "") for record in caplog.records] == [
        FILLED,
        f"config.yaml: {DROPPED}",
    ]


def test_a_run_of_an_earlier_version_goes_on_and_is_reported(earlier, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(earlier, run)
    ended = run_cli(f"resume={run}")
    assert ended.returncode == 0, ended.stderr
    assert FILLED in ended.stderr and DROPPED in ended.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert check.plain(check.stored(run))["model"]["in_chans"] == 3


def test_a_value_of_another_kind_is_refused_with_its_key(earlier, tmp_path):
    values = check.plain(check.stored(earlier))
    values["task"]["epochs"] = "many"
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    with pytest.raises(UserError, match=r"task\.epochs must be a number, got 'many'"):
        check.read(tmp_path)


def test_reading_a_run_asks_nothing_of_its_data_or_of_today_s_rules(tmp_path, monkeypatch):
    cfg = composed("data=folder", f"data.root={tmp_path}")
    stored = check.changed(cfg, data={**cfg.data, "root": "/nowhere/at/all"})
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(stored))
    monkeypatch.setenv("WORLD_SIZE", "7")  # which does not divide the batch
    assert check.read(tmp_path) == stored
    with pytest.raises(UserError, match=r"data\.root=/nowhere/at/all does not exist"):
        check.check(stored)
