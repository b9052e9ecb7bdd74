"""Masks: exact numbers of visible patches, the same for a sample whoever asks, and the shapes that papers describe."""

import functools
import shutil

import numpy as np
import pytest
import test_distributed
import torch
from conftest import (
    ROOT,
    TINY,
    TINY_PRETRAIN,
    composed,
    first_digits,
    make_loader,
    of_type,
    run_here,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from test_distributed import on_ranks, trained

from mae import checkpoint, rng
from mae.config.identity import identity
from mae.data.sampler import Batches, Sampler
from mae.data.transforms import CenterCrop
from mae.errors import UserError
from mae.models.masking import MASKINGS, bind_masking, count_visible, middle_ratio, ratios_of
from mae.runs.files import read_json_lines
from mae.tasks.visualize import drawn_masks, masking_settings

OPTIONS = {"prefetch": 2, "timeout_s": 60.0, "workers": "process", "max_bad_fraction": 0.01}
SETTINGS = {path.stem: of_type(DictConfig, OmegaConf.load(path)) for path in (ROOT / "conf" / "masking").glob("*.yaml")}


def noise(name: str, grid: tuple[int, int], ratio: float, keys: np.ndarray) -> np.ndarray:
    options = {str(key): value for key, value in SETTINGS[name].items() if key != "name"}
    return MASKINGS[name](keys, grid, ratio, **options)


def visible(name: str, grid: tuple[int, int], ratio: float, count: int = 64) -> np.ndarray:
    """(count, rows, columns) True where the encoder sees a patch."""
    values = noise(name, grid, ratio, rng.keys(3, 1, np.arange(count), 1))
    number = count_visible(grid[0] * grid[1], ratio)
    shown = np.zeros(values.shape, bool)
    np.put_along_axis(shown, values.argsort(1, kind="stable")[:, :number], True, 1)
    return shown.reshape(count, *grid)


def test_each_masking_has_its_yaml():
    assert SETTINGS.keys() == MASKINGS.keys()
    assert all(SETTINGS[name]["name"] == name for name in MASKINGS)


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(MASKINGS)),
    grid=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32 - 1),
)
def test_noise_is_a_function_of_the_key_and_separates_exactly(name, grid, ratio, seed):
    if int(grid[0] * grid[1] * (1 - ratio)) < 1:
        return
    keys = rng.keys(seed, 0, np.arange(5), 1)
    values = noise(name, grid, ratio, keys)
    assert values.shape == (5, grid[0] * grid[1]) and values.dtype == np.float32 and np.isfinite(values).all()
    alone = np.concatenate([noise(name, grid, ratio, keys[k : k + 1]) for k in reversed(range(5))])[::-1]
    np.testing.assert_array_equal(values, alone)  # whatever batch a sample is in
    if name == "block":  # the masked patches are those of the rectangles, not of a tie
        number = count_visible(grid[0] * grid[1], ratio)
        ordered = np.sort(values, 1)
        assert (ordered[:, number - 1] < 0.5).all() and (ordered[:, number:] >= 0.5).all()


def test_random_noise_is_the_loader_s_of_earlier_versions():
    keys = rng.keys(0, 2, np.arange(4), 1)
    np.testing.assert_array_equal(noise("random", (8, 8), 0.75, keys), rng.uniform(keys, 64).astype(np.float32))


def test_uniform_shows_one_patch_of_each_window():
    windows = visible("uniform", (14, 14), 0.75).reshape(-1, 7, 2, 7, 2).sum((2, 4))
    assert (windows == 1).all()
    half = visible("uniform", (8, 12), 0.5).reshape(-1, 4, 2, 6, 2).sum((2, 4))
    assert (half == 2).all()
    shown = visible("uniform", (14, 14), 0.75, 2000).mean(0)
    assert abs(shown - 0.25).max() < 0.06  # each patch of a window equally often


def test_grid_shows_one_patch_of_each_two_by_two_of_all_samples_alike():
    shown = visible("grid", (14, 14), 0.75)
    assert (shown.reshape(-1, 7, 2, 7, 2).sum((2, 4)) == 1).all() and (shown == shown[0]).all()


def test_grid_at_one_half_is_a_chequerboard():
    shown = visible("grid", (8, 8), 0.5)[0]
    assert (shown == (np.indices((8, 8)).sum(0) % 2 == 0)).all()


def test_blocks_are_rectangles_and_differ_between_samples():
    masked = ~visible("block", (14, 14), 0.4)
    assert len(np.unique(masked.reshape(64, -1), axis=0)) == 64
    # a patch of a rectangle of 16 and more has a masked neighbour above or below, and at a side
    padded = np.pad(masked, ((0, 0), (1, 1), (1, 1)))
    beside = padded[:, 1:-1, 2:] | padded[:, 1:-1, :-2] | padded[:, 2:, 1:-1] | padded[:, :-2, 1:-1]
    assert (beside[masked]).mean() > 0.99


def spectrum(name: str) -> np.ndarray:
    """Mean power of the visible patches by spatial frequency, in 8 rings from low to high."""
    shown = visible(name, (32, 32), 0.75, 128).astype(float)
    power = (abs(np.fft.fft2(shown - shown.mean((1, 2), keepdims=True))) ** 2).mean(0)
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))
    ring = np.minimum((radius / 0.5 * 8).astype(int), 7)
    rings = np.array([power[(ring == k) & (radius > 0)].mean() for k in range(8)])
    return rings / rings.mean()


def test_coloured_noise_has_the_spectrum_of_its_colour():
    white, red, blue, green, purple = (spectrum(name) for name in ("random", "red", "blue", "green", "purple"))
    assert abs(white - 1).max() < 0.15
    assert red[0] > 5 * red[5] and blue[0] < 0.75 * blue[5]
    peak = int(green.argmax())
    assert 0 < peak < 6 and green[0] < 0.8 * green[peak] and green[7] < 0.8 * green[peak]
    trough = int(purple.argmin())
    assert 0 < trough < 7 and purple[trough] < purple[0] and purple[trough] < purple[7]


def test_uniform_shows_windows_that_the_edge_cuts_as_often_as_whole_ones():
    shown = visible("uniform", (7, 9), 0.75, count=4000).mean(0)
    assert float(shown[6, 8]) == pytest.approx(0.75, abs=0.03)  # 15 of 20 windows show one patch
    assert float(shown[2, 2]) == pytest.approx(0.75 / 4, abs=0.03)


def test_a_ratio_that_shows_no_patch_is_refused():
    with pytest.raises(ValueError, match=r"A mask ratio of 0.95 keeps 0 of 10 patches"):
        count_visible(10, 0.95)


# ---------------------------------------------------------------- in a run


def test_the_group_chooses_and_its_values_are_checked():
    assert composed("masking=green").masking.wide_sigma == 2.0
    for override, sentence in (
        ("masking.sigma=0", r"masking.sigma must lie in \(0, 64\], got 0"),
        ("masking.sigma=1e6", r"masking.sigma must lie in \(0, 64\], got 1000000"),
        ("masking.wide_sigma=65", r"masking.wide_sigma must lie in \(0, 64\], got 65"),
        ("masking.wide_sigma=0.5", r"masking.wide_sigma=0.5 must be greater than masking.sigma=0.8"),
        ("masking.window=2", r"masking.window is not a key of the configuration"),
    ):
        with pytest.raises(UserError, match=sentence):
            composed("masking=green", f"+{override}" if "window" in override else override)
    with pytest.raises(UserError, match=r"task.masks names gren, which is none of .* Did you mean green\?"):
        composed("task=visualize", "init=RUN", "task.masks=[gren]")


def test_the_default_masking_leaves_a_run_its_directory():
    cfg = composed(*TINY_PRETRAIN)
    assert not [key for key in identity(cfg) if key.startswith("masking")]
    assert identity(composed(*TINY_PRETRAIN, "masking=grid"))["masking.name"] == "grid"


@pytest.mark.parametrize(
    "name",
    ["block", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted({*MASKINGS} - {"block", "random"}))],
)
def test_a_run_with_other_masks_resumes_and_is_cut_up_to_the_same_losses(tmp_path, name):
    base = [*TINY_PRETRAIN, f"masking={name}", "checkpoint.every_epochs=0.2", "checkpoint.keep=100"]
    if name == "block":
        base.append("masking.smallest_block=2")
    run_here(tmp_path / "whole", *base, "data.num_workers=2")
    run_here(tmp_path / "cut", *base)
    for path in checkpoint.checkpoints_of(tmp_path / "cut")[2:]:  # as if it had been killed after step 2
        shutil.rmtree(path)
    (tmp_path / "cut" / "summary.json").unlink()
    run_here(tmp_path / "cut", *base)
    run_here(tmp_path / "parts", *base, "task.micro_batch_size=8")
    whole, cut, parts = (losses(tmp_path / run) for run in ("whole", "cut", "parts"))
    assert whole == cut and len(whole) > 4
    assert parts == pytest.approx(whole, rel=1e-5)
    run_here(tmp_path / "random", *TINY_PRETRAIN)
    assert losses(tmp_path / "random")[0] != whole[0]
    assert composed(*base).masking == OmegaConf.load(tmp_path / "cut" / "config.yaml").masking


def losses(run) -> list[float]:
    return [row["loss"] for row in read_json_lines(run / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*MASKINGS} - {"random"}))
def test_two_ranks_draw_the_masks_of_one(tmp_path, name):
    overrides = [*TINY_PRETRAIN, f"masking={name}", "data.num_workers=0", "task.max_steps=3"]
    for world in (1, 2):
        on_ranks(world, tmp_path / str(world), functools.partial(trained, overrides=overrides))
    whole = test_distributed.losses(tmp_path / "1")
    assert len(whole) > 2 and test_distributed.losses(tmp_path / "2") == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "green"])  # of all: masks are data, and no graph knows their kind
def test_inductor_and_bf16_have_the_losses_of_plain_blocks(tmp_path, name):
    base = [*TINY_PRETRAIN, f"masking={name}", "task.max_steps=3"]
    torch._dynamo.reset()
    run_here(tmp_path / "plain", *base)
    run_here(tmp_path / "compiled", *base, "task.compile=blocks")
    run_here(tmp_path / "half", *base, "task.precision=bf16")
    log = (tmp_path / "compiled" / "log.txt").read_text()
    assert "switched off" not in log and "compiled" in log
    plain, compiled, half = (losses(tmp_path / run) for run in ("plain", "compiled", "half"))
    assert compiled == pytest.approx(plain, rel=1e-4) and half == pytest.approx(plain, rel=0.05)
    torch._dynamo.reset()


def test_pictures_of_every_masking(tmp_path):
    run_here(tmp_path / "run", *TINY_PRETRAIN, "task.max_steps=1")
    names = ",".join(MASKINGS)
    overrides = ["task=visualize", f"init={tmp_path / 'run'}", f"task.masks=[{names}]", "task.mask_ratios=[0.75]"]
    assert run_here(tmp_path / "pictures", *TINY, *overrides, "task.num_images=2", "task.attention=false") == 0
    drawn = sorted(path.name for path in (tmp_path / "pictures" / "images").iterdir())
    assert drawn == sorted(f"reconstruction_{name}_75.png" for name in MASKINGS)


def test_pictures_show_the_masking_that_is_chosen():
    listed = ["random", "block"]
    for chosen, drawn in (("random", listed), ("block", listed), ("green", [*listed, "green"])):
        assert drawn_masks(composed("task=visualize", "init=RUN", f"masking={chosen}"), listed) == drawn
    assert drawn_masks(composed("task=visualize", "init=RUN"), ["grid"]) == ["grid"]


def test_pictures_take_a_masking_of_the_config_or_its_file():
    cfg = composed("task=visualize", "init=RUN", "masking=green", "masking.sigma=0.9")
    assert masking_settings(cfg, "green").sigma == 0.9
    assert masking_settings(cfg, "block") == composed("masking=block").masking


# ---------------------------------------------------------------- ratios from a range


@settings(max_examples=60)
@given(
    patches=st.integers(4, 300),
    bounds=st.tuples(st.floats(0.05, 0.9), st.floats(0.05, 0.9)).filter(lambda pair: abs(pair[0] - pair[1]) > 0.01),
    seed=st.integers(0, 2**32 - 1),
    world=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 4]),
)
def test_a_step_has_one_ratio_of_a_range_whoever_computes_it(patches, bounds, seed, world, micro):
    low, high = sorted(bounds)
    if int(patches * (1 - high)) < 1:
        return
    ratios = ratios_of([low, high], patches)
    counts = [count_visible(patches, ratio) for ratio in ratios]
    assert len(set(counts)) == len(counts) <= 9 and counts == sorted(counts, reverse=True)
    assert counts[0] == count_visible(patches, low) and counts[-1] == count_visible(patches, high)
    assert count_visible(patches, middle_ratio([low, high])) in counts
    drawn = []
    for rank in range(world):
        sampler = Sampler(16, Batches(8, micro, seed, rank, world, mask_ratios=ratios))
        for epoch, step in ((0, 0), (0, 1), (3, 1)):
            own = {ticket.ratio for ticket in sampler.micro_batches(epoch, step)}
            assert len(own) == 1
            drawn.append((epoch, step, own.pop()))
    assert len(set(drawn)) == 3 and all(0 <= ratio < len(ratios) for _, _, ratio in drawn)


def test_all_ratios_of_a_range_are_drawn_and_one_number_draws_none():
    ratios = ratios_of([0.6, 0.9], 196)
    sampler = Sampler(800, Batches(8, 8, 0, mask_ratios=ratios))
    drawn = np.bincount([sampler.ratio(0, step) or 0 for step in range(100)], minlength=9)
    assert len(ratios) == 9 and drawn.min() > 3 and ratios[4] == middle_ratio([0.6, 0.9]) == 0.75
    assert ratios_of(0.75, 196) == () and Sampler(8, Batches(8, 8, 0)).ratio(0, 0) is None


def test_the_loader_masks_a_batch_at_its_ratio():
    ratios, masking = (0.25, 0.5, 0.75), bind_masking(SETTINGS["block"], (4, 4), 0.5)
    crop = CenterCrop(img_size=16, crop_fraction=1.0)
    loader = make_loader(first_digits(48), crop, 8, 4, masking=masking, mask_ratios=ratios, num_workers=0, **OPTIONS)
    seen = set()
    for number, step in enumerate(loader.steps(0)):
        for batch in step:
            ratio = batch["ratio"].shape[0]
            assert ratio == loader.sampler.ratio(0, number) and batch["ratio"].numel() == 0
            assert ((batch["noise"] >= 0.5).sum(1) == 16 - count_visible(16, ratios[ratio])).all()  # blocks of a ratio
            seen.add(ratio)
    loader.close()
    assert len(seen) > 1
