"""Masks: exact numbers of visible patches, the same for a sample whoever asks, and the shapes that papers describe."""

import shutil

import numpy as np
import pytest
from conftest import ROOT, TINY, TINY_PRETRAIN, composed, of_type, run_cli, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from mae import checkpoint, rng
from mae.config.identity import identity
from mae.errors import UserError
from mae.models.masking import MASKINGS, count_visible
from mae.runs.files import read_json_lines

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


@settings(deadline=None, max_examples=150)
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


def test_a_ratio_that_shows_no_patch_is_refused():
    with pytest.raises(ValueError, match=r"task.mask_ratio 0.95 keeps 0 of 10 patches"):
        count_visible(10, 0.95)


# ---------------------------------------------------------------- in a run


def test_the_group_chooses_and_its_values_are_checked():
    assert composed("masking=green").masking.wide_sigma == 2.0
    for override, sentence in (
        ("masking.sigma=0", "masking.sigma must be greater than 0"),
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


@pytest.mark.parametrize("name", ["block", "green"])
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


def test_two_ranks_draw_the_masks_of_one(tmp_path):
    base = [*TINY_PRETRAIN, "masking=green", "data.num_workers=0"]
    run_here(tmp_path / "one", *base)
    process = run_cli(*base, "launcher.processes=2", f"output_dir={tmp_path / 'two'}")
    assert process.returncode == 0, process.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_pictures_of_every_masking(tmp_path):
    run_here(tmp_path / "run", *TINY_PRETRAIN, "task.max_steps=1")
    names = ",".join(MASKINGS)
    overrides = ["task=visualize", f"init={tmp_path / 'run'}", f"task.masks=[{names}]", "task.mask_ratios=[0.75]"]
    assert run_here(tmp_path / "pictures", *TINY, *overrides, "task.num_images=2", "task.attention=false") == 0
    drawn = sorted(path.name for path in (tmp_path / "pictures" / "images").iterdir())
    assert drawn == sorted(f"reconstruction_{name}_75.png" for name in MASKINGS)
