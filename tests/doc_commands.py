"""The commands of README.md, CONTRIBUTING.md and docs/: which there are, and how a test runs each of them.

`commands` reads them from the pages. A command runs as it stands, in a directory that holds what its placeholders name,
with overrides behind it that make it small. `NOT_RUN` lists those that cannot run in a test, with the reason.
"""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT
from omegaconf import DictConfig, OmegaConf

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"```(?P<language>\w*)\n(?P<text>.*?)```", re.S)
PROGRAMS = r"python|mae|torchrun|pytest|make|pip|git|pre-commit|wandb|sbatch|salloc|eval|cd|hf"
COMMAND = re.compile(rf"^(?:\w+=\S+ )*(?:{PROGRAMS})(?: |$)")
RUN = re.compile(r"^(?:python run\.py|mae)(?: |$)")


@dataclass(frozen=True)
class Command:
    """A line that a reader can type, as it stands on a page, and the output that the page shows below it."""

    page: str  # relative to the repository
    line: str
    output: str = ""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)

    @property
    def overrides(self) -> list[str]:
        """The words behind `python run.py` or `mae`."""
        return self.words[2 if self.words[0] == "python" else 1 :]


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page: lines of fences without a language, and code within the text."""
    text, name = page.read_text(), str(page.relative_to(ROOT))
    for fence in FENCE.finditer(text):
        if not fence["language"]:
            yield from fenced(name, fence["text"])
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        if COMMAND.match(code) and len(code.split()) > 1:
            yield Command(name, without_comment(code))


def fenced(page: str, text: str) -> Iterator[Command]:
    """The commands of a fence. In one with `$ ` the other lines are what the command above them prints."""
    if "$ " in text:
        for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
            line, _, output = part.partition("\n")
            yield Command(page, without_comment(line), output)
        return
    for line in text.splitlines():
        if COMMAND.match(line):
            yield from (Command(page, part) for part in without_comment(line).split(" && "))


def without_comment(line: str) -> str:
    return re.sub(r"\s+#\s.*", "", line).strip()


def other_fences(page: Path) -> Iterator[str]:
    """Fences without a language in which a line is neither a command nor its output."""
    for fence in FENCE.finditer(page.read_text()):
        lines = fence["text"].splitlines()
        if not fence["language"] and "$ " not in fence["text"] and not all(COMMAND.match(line) for line in lines):
            yield fence["text"]


# ---------------------------------------------------------------- commands that a test cannot run

# A pattern of the line, and why it does not run. A run is composed and checked instead, a script's arguments are parsed
CLUSTER = "needs a cluster; tests/test_slurm_cluster.py runs such commands on one"
NETWORK = "needs a network or an account; a test of its own has a server on this machine"
INSTALLS = "installs software, or is this test suite"
MINUTES = "takes minutes or hours; a test of its own runs its parts"
NOT_RUN = {
    r"launcher=slurm\b|\b(?:cancel|retry_failed)=": CLUSTER,
    r"timm:NAME|hf://|wandb:|push_to_hub|^wandb s|^hf auth|mae\.dashboard": NETWORK,
    r"^(?:\w+=\S+ )*(?:pip|git|cd|make|pytest|pre-commit) |-m venv|^\. ": INSTALLS,
    r"benchmarks/(?:evidence\.py DIR|gpu|all|decoders|finetune|step|memory|loader|scaling|residual)": MINUTES,
    r"experiment=paper_segment": "needs a published set in its layout; tests/test_segmentation_sets.py has small ones",
    r"-sc install=|model=vit_$": "is of completion; tests/test_runs_table.py completes in a shell",
    r" --serve$": "serves until it is stopped; tests/test_runs_table.py asks such a server",
    r"init=(?:RUNS/pretrain|PRETRAINED)": "goes on with a run of the command before it, which takes minutes",
    r"^torchrun ": "tests/test_distributed.py runs it, on two ranks",
    r" \.\.\.$|data=\.\.\.": "stands for commands of which others are run",
}


def reason(command: Command) -> str | None:
    """Why a command is not run; None where it is."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command.line)), None)


# ---------------------------------------------------------------- what stands for a placeholder

STAND_INS = {
    "masking=NAME": "masking=block",
    "+sweeps=NAME": "+sweeps=masking",
    "data.root=DIR": "data.root=photos",
    "data.mean=[...]": f"data.mean={[0.5] * 12}",
    "data.std=[...]": f"data.std={[0.25] * 12}",
    "resume=RUN": "resume=INTERRUPTED",
    "replay=RUN": "replay=DIVERGED",
    "target.teacher=RUN_OR_FILE": "target.teacher=RUN",
    "target.layer=9": "target.layer=1",  # the stand-in has two blocks
    "init=FILE": "init=RUN_224",
    "target.fitted=runs/stats": "target.fitted=STATS",
    "init=RUNS/pretrain": "init=RUN",
    'task.files=[photos/a.jpg,"more/*.png"]': 'task.files=[flat/a.jpg,"more/*.png"]',
    'task.files=["photos/*.jpg"]': 'task.files=["flat/*.jpg"]',
    "target.vocabulary=8192": "target.vocabulary=16",
    "status=DIR": "status=RUN",
    "status=first": "status=RUN",
    "PHOTOS": "photos",
    "runs/evidence/results.json": str(ROOT / "docs" / "results.json"),
    "docs/results.md": "results.md",
}


def with_stand_ins(words: list[str]) -> list[str]:
    """The words of a command, with a directory, file or value of the workspace for each placeholder."""
    stand_ins = dict(STAND_INS)
    if {"task=predict", "task=evaluate"} & set(words):
        stand_ins["init=RUN"] = "init=CLASSIFIER"
    if any(word.startswith("experiment=") for word in words):
        stand_ins |= {"init=RUN": "init=RUN_224", "data.root=DIR": "data.root=imagenet"}
    if "data.in_chans=4" in words:
        stand_ins["data.root=DIR"] = "data.root=bands"
    if "data=segmentation_folder" in words:
        stand_ins["data.root=DIR"] = "data.root=maps"
    if "data=imagenet" in words:
        stand_ins["data.root=DIR"] = "data.root=imagenet"
    return [stand_ins.get(word, word) for word in words]


# ---------------------------------------------------------------- how a run becomes small

STEPS = {"max_steps": 1, "warmup_epochs": 0, "batch_size": 8}
SMALL: dict[str, Any] = {"device": "cpu", "launcher.processes": 1, "data.num_workers": 0, "data.fraction": 0.1}
SMALL |= {"data.scenes": 24, "data.val_scenes": 5, "data.num_classes": 3}
SMALL |= {f"task.{key}": value for key, value in STEPS.items()}
MODEL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
MODEL |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
MEMBERS = 2  # of a sweep, at most


def small_overrides(words: list[str], cfg: DictConfig) -> list[str]:
    """Overrides that follow a command's own and make its run small: of keys that its config has."""
    values = dict(SMALL)
    if not any(word.startswith("launcher.processes=") for word in words):
        del values["launcher.processes"]
    if not (cfg.data.root and cfg.data.num_classes):
        del values["data.num_classes"]  # else the classes of the workspace's folders count, not the data's own
    if any(word.startswith("target.teacher=") for word in words):
        values["data.img_size"] = 16  # as the teacher's
    if cfg.data.root:
        del values["data.fraction"]
    if not cfg.init or cfg.init == "auto" or any(word.startswith("experiment=") for word in words):
        values |= {f"model.{key}": value for key, value in MODEL.items()}
    small = [f"{key}={value}" for key, value in values.items() if has(cfg, key)]
    if cfg.task.name == "pipeline":
        small += [in_stage(stage, cfg) for stage in cfg.task.stages]
    return small


def has(cfg: DictConfig, key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name in (OmegaConf.select(cfg, section) if section else cfg)


def in_stage(stage: str, cfg: DictConfig) -> str:
    """One step in a stage of a pipeline, after what the command sets there."""
    steps = [f"task.{key}={value}" for key, value in STEPS.items()]
    return f"task.overrides.{stage}={json.dumps([*cfg.task.overrides[stage], *steps])}"


def few_members(words: list[str]) -> list[str]:
    """The overrides of a sweep, with the first values of what they list and of what `+sweeps=NAME` lists."""
    swept = [word for word in words if word.startswith("+sweeps=")]
    chosen = []
    if swept:
        sweep = yaml.safe_load((ROOT / "sweeps" / f"{swept[0].partition('=')[2]}.yaml").read_text())
        for key, values in sweep["hydra"]["sweeper"]["params"].items():
            names = list(sweep["members"]) if key == "member" else values.split(",")
            chosen.append(f"{key}={','.join(map(str, names[:MEMBERS]))}")
    return [first_values(word, MEMBERS) for word in words] + chosen


def first_values(override: str, count: int = 1) -> str:
    """An override with the first of the values that it lists."""
    key, _, value = override.partition("=")
    listed = value[:1] not in "[({'\"" and "(" not in value
    return f"{key}={','.join(value.split(',')[:count])}" if listed and "," in value else override
