"""The recipes of CONTRIBUTING.md: each is added to a copy of the repository, and they run together."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, TINY, copy_program, run_copy
from omegaconf import OmegaConf

HEADER = r"# (?P<file>[\w/.]+)(?:, entry in (?P<table>\w+): (?P<entry>[^\n]+))?\n"
BLOCK = re.compile(rf"```(?:python|yaml)\n{HEADER}(?P<code>.*?)```", re.S)


def add(repository: Path, file: str, table: str | None, entry: str | None, code: str) -> None:
    """Types a block of CONTRIBUTING.md into a repository."""
    path = repository / file
    if path.suffix == ".yaml":
        path.write_text(code)
        return
    text = path.read_text()
    if table is None:
        path.write_text(f"{text}\n\n{code}")
        return
    head, opening, tail = text.partition(f"\n{table} = {{")
    assert opening, f"{file} has no table {table}"
    path.write_text(f"{head}\n{code}\n{opening}\n    {entry},{tail}")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    copy = copy_program(tmp_path_factory.mktemp("repository"))
    blocks = list(BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text()))
    assert len(blocks) == 15
    for block in blocks:
        add(copy, block["file"], block["table"], block["entry"], block["code"])
    return copy


ADDED = ["masking=stripes", "optimizer=rmsprop", "augmentation=darkened", "data=two_digits", "data.img_size=16"]
ADDED += ["model.decoder=pooled", "target=patch_mean"]


def test_what_the_recipes_add_runs_together(repository):
    small = [override for override in TINY if not override.startswith("data.")]
    done = run_copy(repository, *small, *ADDED, "task.max_steps=3", "task.log_every_steps=1", "output_dir=run")
    assert done.returncode == 0, done.stderr
    cfg = OmegaConf.load(repository / "run" / "config.yaml")
    assert (cfg.masking.width, cfg.optimizer.alpha, cfg.augmentation.most) == (2, 0.99, 2.0)
    summary = json.loads((repository / "run" / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["val_loss"] > 0


def test_the_data_set_for_segmentation_is_segmented(repository):
    small = [override for override in TINY if not override.startswith("data.")]
    arguments = ["task=segment", "data=digit_ink", "data.img_size=16", "task.max_steps=2", "output_dir=segment"]
    done = run_copy(repository, *small, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((repository / "segment" / "summary.json").read_text())["miou"] > 0
    assert (repository / "segment" / "iou.csv").read_text().splitlines()[1].startswith("paper,")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("masking.width=0", "masking.width must be 1 or more, got 0."),
        ("target.gain=0", "target.gain must be greater than 0, got 0.0."),
        ("optimizer.alpha=1", "optimizer.alpha must lie in (0, 1), got 1.0."),
        ("augmentation.most=0.5", "augmentation.most must be 1 or more, got 0.5."),
        ("+masking.colour=1", "masking.colour is not a key of the configuration."),
    ],
)
def test_their_keys_are_checked_like_all_others(repository, override, sentence):
    done = run_copy(repository, *ADDED, override, "dry_run=true")
    assert done.returncode == 1 and sentence in done.stderr
