"""Every command and every line of Python in README.md, CONTRIBUTING.md and docs/ is executed, scaled down."""

import argparse
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, exit_code, run_main
from doc_commands import (
    FENCE,
    MINUTES,
    NOT_RUN,
    PAGES,
    RUN,
    Command,
    commands,
    few_members,
    first_values,
    other_fences,
    reason,
    small_overrides,
    with_stand_ins,
)
from doc_workspace import FAST, make_data, make_runs
from hydra import initialize_config_dir
from omegaconf import DictConfig

from mae import cli
from mae.config import from_run
from mae.config.check import check_config, resolve
from mae.config.compose import composed
from mae.config.overrides import key_of
from mae.config.sweep_members import with_member
from mae.launch.slurm.status import VERBS

pytestmark = pytest.mark.slow
README = "README.md"
COMMANDS = list({command.line: command for page in PAGES for command in commands(page)}.values())
FIVE_MINUTES = [
    c for c in COMMANDS if re.search(r"data\.img_size=32|output_dir=fine|init=fine", c.line) and c.page == README
]
RUNS = [command for command in COMMANDS if RUN.match(command.line) and command not in FIVE_MINUTES]


# ---------------------------------------------------------------- where commands run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The directory from which each command's own gets links."""
    folder = tmp_path_factory.mktemp("documents")
    torch.set_num_threads(1)
    make_data(folder)
    make_runs(folder)
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch) -> Path:
    """A command's current directory, with what placeholders name."""
    for path in prepared.iterdir():
        if path.name in ("INTERRUPTED", "DIVERGED"):  # which the command changes
            shutil.copytree(path, tmp_path / path.name)
        else:
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(prepared / "RUN", tmp_path / "runs" / "RUN")
    shutil.copytree(prepared / "RUN", tmp_path / "DIR" / "member=1")
    for ratio in ("0.5", "0.9"):  # of the tutorial's sweep
        member = tmp_path / "runs" / "first_sweep" / f"mask_ratio_{ratio}"
        shutil.copytree(prepared / "RUN", member)
        shutil.copytree(prepared / "RUN", member / "pretrain")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


# ---------------------------------------------------------------- runs


def name_of(command: Command) -> str:
    return f"{command.page}: {command.line[:80]}"


def cases(chosen: list[Command], run: bool) -> list[Any]:
    return [pytest.param(c, id=name_of(c)) for c in chosen if (reason(c) is None) == run]


def scaled(command: Command) -> list[str]:
    """The words of a run: its own with stand-ins for placeholders, then those that make it small."""
    words = with_stand_ins(command.overrides)
    keys = {key_of(word) for word in words}
    if command.output or keys & {"resume", "replay", "dry_run", *VERBS, *cli.SUBCOMMANDS, "--cfg", "--help"}:
        return words
    words = few_members(words) if "-m" in words else words
    options = ("-m", "--config-dir", "my_conf", "data=mine")
    plain = [first_values(word) for word in words if word not in options and not word.startswith("member=")]
    return words + small_overrides(words, composed_words(plain))


def composed_words(words: list[str]) -> DictConfig:
    """The checked config of a command, with the values of the run that it starts from."""
    chosen = from_run.with_groups(words)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg, _ = with_member(composed(chosen), chosen)
        return check_config(resolve(from_run.with_run_values(cfg, chosen)))


@pytest.mark.parametrize("command", cases(RUNS, run=True))
def test_a_run_ends_well(command, here, monkeypatch, capsys):
    words = scaled(command)
    program = cli.command if command.line.startswith("mae") else cli.main
    code = run_main(words, monkeypatch, program)
    written = capsys.readouterr()
    if command.output:
        assert code == 1 and written.err == command.output
    else:
        assert code == 0, f"{shlex.join(words)}\n{written.out}{written.err}"


@pytest.mark.parametrize("command", cases(RUNS, run=False))
def test_a_run_that_needs_more_than_a_test_has_composes(command, here):
    words = with_stand_ins(command.overrides)
    if not re.search(r"\.\.\.|--serve| -sc |vit_$", command.line) and not {key_of(word) for word in words} & {*VERBS}:
        words = [first_values(word) for word in words if word != "-m"]
        assert composed_words(words).task.name


# ---------------------------------------------------------------- other programs

MODULES = [command for command in COMMANDS if command.line.startswith("python -m mae.")]
SCRIPTS = [command for command in COMMANDS if re.match(r"python (?:benchmarks|tests)/", command.line)]


@pytest.mark.parametrize("command", cases(MODULES, run=True))
def test_a_module_ends_well(command, here, monkeypatch, capsys):
    words = with_stand_ins(command.words[2:])
    if words[0] == "mae.search":
        words = [*words, *FAST, "device=cpu", "data.fraction=0.1", "--trials=1"]
    (here / "shards").unlink()  # so that packing starts anew
    monkeypatch.setattr(sys, "argv", words)
    code = exit_code(lambda: runpy.run_module(words[0], run_name="__main__"))
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", cases(SCRIPTS, run=True))
def test_a_script_ends_well(command, here, monkeypatch, capsys):
    line, _, file = command.line.partition(" > ")
    words = with_stand_ins(shlex.split(line)[1:])
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    code = exit_code(lambda: runpy.run_path(str(ROOT / words[0]), run_name="__main__"))
    written = capsys.readouterr()
    assert code == 0, written.err
    assert not file or written.out == (ROOT / file).read_text()


class Parsed(Exception):
    """The arguments of a script are as its parser wants them."""


@pytest.mark.parametrize("command", [c for c in SCRIPTS if reason(c) == MINUTES], ids=name_of)
def test_the_arguments_of_a_long_script_are_known(command, here, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *arguments, **options):
        parse(parser, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", command.words[1:])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / command.words[1]), run_name="__main__")


# ---------------------------------------------------------------- the first five minutes, Python and YAML


def test_five_minutes_of_the_readme(here, monkeypatch):
    assert len(FIVE_MINUTES) == 5
    for command in FIVE_MINUTES:
        assert run_main(scaled(command), monkeypatch, cli.main) == 0, command.line
    block = re.search(r"```python\n(.*?)```", (ROOT / README).read_text(), re.S)
    scope: dict[str, Any] = {}
    assert block
    exec(compile(block[1], README, "exec"), scope)
    assert scope["features"].shape[0] == 1 and set(scope["names"][0]) == {"cat", "dog", "owl"}


YAML = {
    f["text"].splitlines()[0]: f["text"]
    for page in PAGES[2:]
    for f in FENCE.finditer(page.read_text())
    if f[1] == "yaml"
}


def test_a_sweep_of_ones_own_plans_its_members(here, monkeypatch, capsys):
    (here / "own" / "sweeps").mkdir(parents=True)
    (here / "own" / "sweeps" / "mine.yaml").write_text(YAML["# @package _global_"])
    assert run_main(["--config-dir", "own", "-m", "+sweeps=mine", "dry_run=true"], monkeypatch, cli.command) == 0
    assert capsys.readouterr().out.count("pretrain") >= 2


def test_a_cluster_of_ones_own_composes(here, monkeypatch, capsys):
    (here / "own" / "launcher").mkdir(parents=True)
    (here / "own" / "launcher" / "slurm_mycluster.yaml").write_text(YAML["defaults: [slurm, _self_]"])
    words = ["--config-dir", "own", "launcher=slurm_mycluster", "--cfg", "job"]
    assert run_main(words, monkeypatch, cli.command) == 0
    assert "partition: a100" in capsys.readouterr().out


# ---------------------------------------------------------------- nothing is left out


def test_every_command_is_run_or_has_a_reason():
    tested = [*RUNS, *FIVE_MINUTES, *MODULES, *SCRIPTS]
    assert not [command.line for command in COMMANDS if command not in tested and reason(command) is None]
    assert len([command for command in tested if reason(command) is None]) > 70


def test_every_reason_is_needed():
    lines = [command.line for command in COMMANDS]
    assert not [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)]


def test_python_stands_on_pages_whose_test_runs_it():
    pages = {str(page.relative_to(ROOT)) for page in PAGES if "```python" in page.read_text()}
    assert pages == {README, "docs/use.md", "CONTRIBUTING.md"}  # here, tests/test_use.py, tests/test_contributing.py
    assert [text[:5] for page in PAGES for text in other_fences(page)] == ["conf/"]  # a drawing
