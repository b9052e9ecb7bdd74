"""Every combination of groups composes and builds; what is wrong is refused with the full key, in plain words."""

import copy
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from conftest import ROOT, composed, of_type
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from mae.config import build, schema, values
from mae.config.check import check_config, resolve, to_dict
from mae.config.identity import difference, identity, run_directory
from mae.config.saved import read_config
from mae.errors import UserError

GROUPS = {
    name: sorted(p.stem for p in (ROOT / "conf" / name).glob("*.yaml"))
    for name in ("model", "data", "optimizer", "augmentation", "task")
}
WITHOUT_COLOURS = ("scientific", "fashion_mnist", "segmentation_bands")
FITTING = {"vit_huge": "model.img_size=28", "vit_nano": "model.img_size=32"}  # others take 32 with patches of 16


def needs(data: str, tmp: Path) -> list[str]:
    """What a data set cannot do without."""
    return [] if data == "digits" else [f"data.root={tmp}"]


def compose_and_check(tmp: Path, **choices: str) -> None:
    size = FITTING.get(choices["model"], "model.img_size=32")
    if choices["data"] in WITHOUT_COLOURS and choices["augmentation"] in ("finetune", "color_jitter"):
        choices["augmentation"] = "linprobe"
    cfg = composed(*(f"{group}={choice}" for group, choice in choices.items()), size, *needs(choices["data"], tmp))
    assert cfg.task.name == choices["task"] and cfg.model.name == choices["model"]


def test_every_choice_composes_and_passes_the_check(tmp_path):
    for i in range(max(len(choices) for choices in GROUPS.values())):
        compose_and_check(tmp_path, **{name: choices[i % len(choices)] for name, choices in GROUPS.items()})


def pairs_of(chosen: dict[str, str]) -> set[tuple[tuple[str, str], ...]]:
    return set(itertools.combinations(sorted(chosen.items()), 2))


def all_pairs() -> Iterator[dict[str, str]]:
    """Few choices of every group, among which each pair of two groups' choices occurs."""
    groups = itertools.combinations(sorted(GROUPS), 2)
    left = {((a, x), (b, y)) for a, b in groups for x in GROUPS[a] for y in GROUPS[b]}
    while left:
        chosen = dict(min(left))
        for name in [name for name in GROUPS if name not in chosen]:
            best = max(GROUPS[name], key=lambda choice: len(left & pairs_of(chosen | {name: choice})))
            chosen[name] = best
        left -= pairs_of(chosen)
        yield chosen


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_pair_of_choices_composes_and_passes_the_check(tmp_path):
    for choices in all_pairs():
        compose_and_check(tmp_path, **choices)


@pytest.mark.parametrize("model", GROUPS["model"])
def test_every_model_builds_from_its_yaml(model):
    import torch

    from mae.models.mae import MaskedAutoencoder

    cfg = composed(f"model={model}", FITTING.get(model, "model.img_size=32"))
    with torch.device("meta"):
        built = build.call(MaskedAutoencoder, cfg.model, norm_pix_loss=True)
    assert len(built.blocks) == cfg.model.depth


@functools.cache
def default() -> DictConfig:
    """The composed default, not resolved."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config")


def refused(**changes) -> str:
    """The message for a config with a wrong value (`group__key=value`), past Hydra's own grammar."""
    cfg = copy.deepcopy(default())
    OmegaConf.set_struct(cfg, False)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    with pytest.raises(UserError) as caught:
        check_config(resolve(cfg))
    return str(caught.value)


def test_nesterov_needs_momentum():
    with pytest.raises(UserError, match=r"^optimizer.nesterov=true needs optimizer.momentum above 0: set it, or leave"):
        composed("optimizer=sgd", "optimizer.nesterov=true", "optimizer.momentum=0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__mask_ratio": 1.5}, "task.mask_ratio must lie in (0, 1), got 1.5."),
        ({"task__mask_ratio": "much"}, "task.mask_ratio must be a number or a list, each a number, got 'much'."),
        ({"task__mask_ratoi": 0.5}, "task.mask_ratoi is not a key of the configuration. Did you mean mask_ratio?"),
        ({"data__prefetch": -1}, "data.prefetch must be 1 or more, got -1."),
        ({"data__timeout_s": -5.0}, "data.timeout_s must be greater than 0, got -5.0."),
        ({"data__crop_fraction": 0.0}, "data.crop_fraction must lie in (0, 1], got 0.0."),
        ({"optimizer__eps": -1.0}, "optimizer.eps must be greater than 0, got -1.0."),
        ({"optimizer__betas": [0.9]}, "optimizer.betas must be two numbers, got [0.9]."),
        ({"optimizer__betas": []}, "optimizer.betas must be two numbers, got []."),
        ({"data__repeats": 16, "launcher__processes": 4}, "is 8 images for each of 4 devices, which is no multiple"),
        ({"data__repeats": 5}, "task.batch_size=32 is not a multiple of data.repeats=5."),
        ({"task__epochs": -1}, "task.epochs must be greater than 0, got -1.0."),
        ({"task__max_steps": 1.5}, "task.max_steps must be a whole number or null, got 1.5."),
        ({"task__norm_pix_loss": "yes"}, "task.norm_pix_loss must be true or false, got 'yes'."),
        ({"task__norm_pix_loss": 1}, "task.norm_pix_loss must be true or false, got 1."),
        ({"task__precision": "bf61"}, "Did you mean bf16?"),
        ({"task__batch_size": True}, "task.batch_size must be a whole number, got True."),
        ({"task__warmup_epochs": 99}, "task.warmup_epochs=99 is longer than task.epochs=22: lower it too."),
        ({"task__micro_batch_size": 7}, "the nearest that do: 28 or 35."),
        (
            {"launcher__processes": 3},
            "task.batch_size=32 does not divide by 3 devices: the nearest that do: 30 or 33.",
        ),
        (
            {"model__img_size": 30},
            "model.img_size=30 is not a multiple of model.patch_size=4: the nearest that are: 28 or 32.",
        ),
        ({"model__num_heads": 5}, "model.embed_dim=96 is not a multiple of model.num_heads=5."),
        ({"model__img_size": [32, 32, 32]}, "model.img_size must be one number or [height, width]"),
        ({"model__patch_size": [4]}, "model.patch_size must be one number or [height, width], got [4]."),
        ({"model__patch_size": []}, "model.patch_size must be one number or [height, width], got []."),
        ({"task__mask_ratio": 0.999}, "task.mask_ratio=0.999 keeps 0 of the 64 patches"),
        ({"task__eval_mask_ratios": [0.5, 0.999]}, "task.eval_mask_ratios=[0.5, 0.999] keeps 0 of the 64 patches"),
        ({"task__eval_mask_ratios": [0.5, 1.5]}, "task.eval_mask_ratios must lie in (0, 1)"),
        (
            {"optimizer__name": "adam"},
            "optimizer.name must be one of adamw, lars, lion, muon, sgd, got 'adam'. Did you mean adamw?",
        ),
        ({"optimizer__base_lr": float("nan")}, "optimizer.base_lr must be greater than 0, got nan."),
        ({"optimizer__min_lr": 1.0}, "optimizer.min_lr=1 is above the peak learning rate 0.0015"),
        ({"optimizer__betas": [0.9, 1.5]}, "optimizer.betas must lie in [0, 1), got 1.5."),
        ({"optimizer__betas": 0.9}, "optimizer.betas must be a list, each a number, got 0.9."),
        ({"optimizer__momentum": 0.9}, "optimizer.momentum is not a key of the configuration."),
        ({"data__mean": [float("nan")]}, "data.mean must be a finite number, got nan."),
        ({"data__mean": [0.5, float("inf"), 0.5]}, "data.mean must be a finite number, got inf."),
        ({"data__std": [float("nan")]}, "data.std must be greater than 0, got nan."),
        ({"data__std": [0.5, 0.0, 0.5]}, "data.std must be greater than 0, got 0.0."),
        ({"data__std": [float("inf")]}, "data.std must be greater than 0, got inf."),
        ({"data__mean": []}, "data.mean has 0 values for data.in_chans=3"),
        ({"data__mean": [0.1, 0.2]}, "data.mean has 2 values for data.in_chans=3"),
        (
            {"augmentation__scale": [1.0, 0.2]},
            "augmentation.scale must be [low, high] with low <= high, got [1.0, 0.2].",
        ),
        ({"checkpoint__keep": 0}, "checkpoint.keep must be 1 or more, got 0."),
        ({"checkpoint": None}, "checkpoint is missing: choose one, as checkpoint=..."),
        ({"seed": "one"}, "seed must be a whole number, got 'one'."),
        ({"sede": 1}, "sede is not a key of the configuration. Did you mean seed?"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, mps, got 'gpu'. Did you mean cpu?"),
        ({"wandb__mode": "on"}, "wandb.mode must be one of online, offline, off, got 'on'."),
        ({"model__depth": "${model.dept}"}, "model.depth cannot be resolved: Interpolation key 'model.dept' not found"),
        ({"model__depth": "???"}, "model.depth has no value: give it one, as model.depth=..."),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_values_are_refused_in_plain_words(changes, message):
    problems = refused(**changes)
    assert message in problems
    assert len(problems.splitlines()) == 1


def test_a_missing_key_is_named():
    cfg = of_type(DictConfig, OmegaConf.create(OmegaConf.to_container(composed())))
    del cfg.task.mask_ratio
    with pytest.raises(UserError, match=r"task.mask_ratio is missing: add it, as task.mask_ratio="):
        check_config(cfg)


def test_all_mistakes_are_listed_at_once():
    text = refused(task__mask_ratoi=0.5, seed="x", data__nmu_workers=1)
    assert len(text.splitlines()) == 3 and "Did you mean num_workers?" in text


def test_a_typo_inside_a_yaml_file_is_found(tmp_path):
    import shutil

    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    path = tmp_path / "conf" / "optimizer" / "adamw.yaml"
    path.write_text(path.read_text().replace("weight_decay:", "weight_decya:"))
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        cfg = compose("config")
    with pytest.raises(UserError) as caught:
        check_config(resolve(cfg))
    assert "optimizer.weight_decya is not a key of the configuration. Did you mean weight_decay?" in str(caught.value)


def test_none_as_a_word_is_null_where_null_is_allowed():
    assert composed("task.max_steps='None'").task.max_steps is None


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_task():
    assert composed("~recipe").optimizer.base_lr == 1.5e-4
    assert composed().task.epochs == 22
    assert composed("task.epochs=25").task.epochs == 25


def intervals() -> dict[str, str]:
    """Key -> interval, of every group, whatever is chosen of it."""
    hints = {key: hint for key, hint in schema.signature(schema.TOP).items()}
    for group, entries in schema.SCHEMA.items():
        tables = [schema.table(entry.removesuffix("[name]")) for entry in entries if entry.endswith("[name]")]
        for name in tables[0] if tables else [None]:
            hints |= {f"{group}.{key}": hint for key, hint in schema.schema(group, name).items()}
    intervals_of_keys = {key: values.interval_of(hint) for key, hint in hints.items()}
    return {key: interval for key, interval in intervals_of_keys.items() if interval is not None}


INTERVALS = intervals()


def test_the_numbers_of_every_group_have_intervals():
    assert len(INTERVALS) > 100
    assert INTERVALS["seed"] == "[0, 4294967295]" and INTERVALS["task.mask_ratio"] == "(0, 1)"
    assert INTERVALS["optimizer.betas"] == "[0, 1)" and INTERVALS["task.micro_batch_size"] == "[1, inf)"


@given(st.sampled_from(sorted(INTERVALS)), st.floats(allow_nan=False, width=32), st.booleans())
def test_an_interval_in_words_is_the_interval(key, value, in_list):
    interval = INTERVALS[key]
    low, high = (float(x) for x in interval[1:-1].split(","))
    inside = (value > low or (value == low and interval[0] == "[")) and (
        value < high or (value == high and interval[-1] == "]")
    )
    assert bool(list(values.out_of_range(key, [value] if in_list else value, interval))) is not inside


@dataclass(frozen=True)
class Inner:
    width: Annotated[int, "[1, inf)"]


@dataclass(frozen=True)
class Outer(Inner):
    rates: list[Annotated[float, "(0, 1)"]]


SIZE = Literal["small", "large"]
SETTINGS = """
from dataclasses import dataclass
from typing import Annotated, Literal

SIZE = Literal["small", "large"]

@dataclass(frozen=True)
class Inner:
    width: Annotated[int, "[1, inf)"]

@dataclass(frozen=True)
class Outer(Inner):
    rates: list[Annotated[float, "(0, 1)"]]

@dataclass(frozen=True)
class Whole:
    outer: Outer
    size: SIZE | None
"""


@dataclass(frozen=True)
class Whole:
    outer: Outer
    size: SIZE | None


def takes_settings(first: int, *, settings: Whole, depth: int, runtime: str) -> tuple[int, Whole, int, str]:
    return first, settings, depth, runtime


def test_the_fields_of_a_settings_dataclass_are_keys(tmp_path, monkeypatch):
    (tmp_path / "settings.py").write_text(SETTINGS)
    (tmp_path / "user.py").write_text(
        "from mae.settings import Whole\ndef takes_settings(first: int, *, settings: Whole, depth: int): ...\n"
    )
    monkeypatch.setattr(schema, "ROOT", tmp_path)
    keys = schema.signature.__wrapped__("user:takes_settings")
    assert list(keys) == ["width", "rates", "size", "depth"]
    assert (
        values.interval_of(keys["width"]) == "[1, inf)"
        and values.describe(keys["size"]) == "one of small, large or null"
    )
    assert list(values.out_of_range("rates", [0.5, 2.0], values.interval_of(keys["rates"])))
    assert schema.signature.__wrapped__("settings:Whole") == {key: keys[key] for key in ("width", "rates", "size")}


def test_a_settings_dataclass_is_built_from_the_keys_of_the_config():
    cfg = OmegaConf.create({"name": "x", "width": 3, "rates": [0.5], "size": "small", "depth": 2})
    whole = Whole(Outer(3, [0.5]), "small")
    assert build.call(takes_settings, cfg, 1, runtime="r") == (1, whole, 2, "r")
    assert build.call(takes_settings, cfg, 1, runtime="r", settings=whole) == (1, whole, 2, "r")
    assert build.call(Whole, cfg) == whole and build.build({"x": Whole}, cfg) == whole


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b"]), st.one_of(st.integers(), st.floats(allow_nan=False), st.text()), max_size=2
    )
)
def test_difference_is_empty_for_the_same_and_names_what_changed(extra):
    base = {"task": {"name": "x", **extra}, "launcher": {"name": "local"}}
    same, other = OmegaConf.create(base), OmegaConf.create(base | {"launcher": {"name": "slurm"}})
    assert difference(same, other) == []
    changed = OmegaConf.create({"task": {"name": "y", **extra}})
    assert difference(same, changed)[-1] == 'task.name: "x" -> "y"'


def test_the_directory_of_a_run_hangs_on_what_it_computes():
    base = run_directory(composed())
    assert base == run_directory(composed("data.num_workers=3", "wandb=offline", "checkpoint.keep=9"))
    assert base != run_directory(composed("task.mask_ratio=0.5"))
    assert base.parts[0] == "runs"


@pytest.mark.parametrize(("name", "keys"), [
    ("shards", ("image_key", "label_key", "sample_key", "follow_links", "splits")), ("hf", ("follow_links",))
])  # fmt: skip
def test_a_run_of_a_version_without_a_key_goes_on(tmp_path, name, keys):
    cfg = composed(f"data={name}", f"data.root={tmp_path}")
    earlier = to_dict(cfg)
    for key in keys:
        del earlier["data"][key]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(earlier)))
    assert read_config(tmp_path) == cfg and difference(read_config(tmp_path), cfg) == []
    assert not any(f"data.{key}" in identity(cfg) for key in keys)  # so that its directory has the same name
    other = composed(f"data={name}", f"data.root={tmp_path}", "data.follow_links=true")
    assert difference(cfg, other) == ["data.follow_links: null -> true"]
