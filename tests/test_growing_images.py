"""task.img_size_schedule: images that grow. A smaller grid computes as a model of that size, and a run resumes to the
same bits."""

import functools
import re
import shutil
from typing import Any

import pytest
import test_distributed
import torch
from conftest import TINY_PRETRAIN, composed, first_digits, loader_arguments, run_here
from test_decoders import KINDS, autoencoder
from test_distributed import on_ranks, trained
from test_engine import weights
from test_masking import OPTIONS, SETTINGS
from test_targets import losses, resumed

from mae.config.identity import identity
from mae.data.loader import Loader
from mae.data.phases import phases_of
from mae.data.transforms import RandomResizedCrop
from mae.errors import UserError
from mae.models.masking import bind_masking, count_visible
from mae.models.positions import sincos_pos_embed
from mae.models.target import Patches
from mae.models.targets import HogTarget
from mae.perf import compile as compilation
from mae.tools.dry_run import report

SCHEDULE = [[0, 8, 0.5], [1, 12], [2, 16]]
GROWING = [*TINY_PRETRAIN, "task.epochs=3", "task.num_images=2", f"task.img_size_schedule={SCHEDULE}".replace(" ", "")]


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(("decoder", "mask_tokens"), KINDS)
def test_a_smaller_image_has_the_loss_and_gradients_of_a_model_of_its_size(decoder, mask_tokens):
    large = autoencoder(decoder, mask_tokens)
    large.smaller_sizes = ((12, 16),)
    small = autoencoder(decoder, mask_tokens, img_size=[12, 16])
    own = {"pos_embed", "decoder_pos_embed"}
    shared = {name: value for name, value in large.state_dict().items() if name not in own}
    assert set(small.load_state_dict(shared, strict=False).missing_keys) <= own
    images, noise = torch.randn(3, 3, 12, 16, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    result, expected = (model(images, 0.6, noise, 0.5) for model in (large, small))
    assert result.loss.item() == expected.loss.item() and torch.equal(result.mask, expected.mask)
    gradients = [
        torch.autograd.grad(loss, [p for name, p in model.named_parameters() if p.requires_grad and name not in own])
        for loss, model in ((result.loss, large), (expected.loss, small))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    prediction, reference = (model.predict(images, 0.6, noise).pred for model in (large, small))
    assert torch.equal(prediction, reference)


def test_positions_of_a_smaller_grid_are_exactly_its_own_table():
    model = autoencoder("self")
    order = torch.arange(6).expand(2, 6)
    rows = model.own_positions(order, (3, 2))
    assert rows[0].tolist() == [0, 1, 3, 4, 6, 7]  # of a grid of 4 x 3
    table = sincos_pos_embed(32, (3, 2)).float().double()
    assert torch.equal(model.pos_embed[0, 1:][rows[0]], table[1:])


def test_images_of_a_size_outside_the_schedule_are_refused():
    model = autoencoder("self")
    model.smaller_sizes = ((8, 16),)
    with pytest.raises(UserError, match=r"Images are 3 x 12 x 16 .* the model takes 3 x 16 x 24"):
        model(torch.zeros(1, 3, 12, 16, dtype=torch.float64), 0.5)


def test_hog_of_a_smaller_image_is_that_of_its_own_grid():
    def hog(grid):
        return HogTarget(Patches(grid, (8, 8), 3, False), orientations=9, cell=4)

    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(hog((4, 6))(images, images), hog((2, 3))(images, images))


# ---------------------------------------------------------------- the loader


def growing_loader(name: str = "random", repeats: int = 1) -> Loader:
    phases = phases_of([[0, 8, 0.5], [2, [8, 12]], [3, 16, 0.9]], (4, 4), 0.75)
    batches, settings = loader_arguments(16, 8, 3, 0, 1, {**OPTIONS, "num_workers": 2, "repeats": repeats})
    batches = type(batches)(16, 8, 3, masking=bind_masking(SETTINGS[name], (4, 4), 0.75), phases=phases)

    def crop(size: Any) -> RandomResizedCrop:
        return RandomResizedCrop(img_size=size, scale=[0.2, 1.0], ratio=[0.75, 1.3], min_crop=0.0, hflip=True)

    return Loader(first_digits(40), crop([16, 16]), batches, settings, by_phase=[crop([*p.size]) for p in phases])


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_each_epoch_has_crops_and_masks_of_its_size(name):
    loader = growing_loader(name)
    for epoch, size, ratio in (
        (0, (8, 8), 0.5),
        (1, (8, 8), 0.5),
        (2, (8, 12), 0.75),
        (3, (16, 16), 0.9),
        (7, (16, 16), 0.9),
    ):
        patches = size[0] // 4 * (size[1] // 4)
        for batch in loader.batches_of(epoch, 1):
            assert batch["image"].shape == (8, 3, *size) and batch["noise"].shape == (8, patches)
            assert batch["ratio"].shape == (min(epoch // 2 + epoch // 3, 2), 0)
            if name == "block":  # as many patches as the ratio says
                assert ((batch["noise"] >= 0.5).sum(1) == patches - count_visible(patches, ratio)).all()
    loader.close()


@pytest.mark.parametrize("repeats", [1, 2])
def test_batches_are_the_same_from_any_place_across_sizes(repeats):
    whole, later = growing_loader(repeats=repeats), growing_loader(repeats=repeats)
    steps = [[*step] for epoch in range(4) for step in whole.steps(epoch)]
    again = [[*step] for epoch in range(1, 4) for step in later.steps(epoch, int(epoch == 1))]
    assert len({batch["image"].shape for step in steps for batch in step}) > 2
    for step, other in zip(steps[-len(again) :], again, strict=True):
        for batch, same in zip(step, other, strict=True):
            assert all(torch.equal(batch[key], same[key]) for key in batch)
    whole.close()
    later.close()


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["[]"],
            r"must list \[epoch, size\] or \[epoch, size, mask_ratio\], each size one number or \[height, width\]",
        ),
        (["[[0]]"], r"must list \[epoch, size\] or .* got \[\[0\]\]."),
        (["[[0,8,1.5]]"], r"must list \[epoch, size\] or .* got \[\[0, 8, 1.5\]\]."),
        (["[[1,8],[2,16]]"], r"task.img_size_schedule must begin with epoch 0 and its epochs must rise, got \[1, 2\]."),
        (["[[0,8],[2,12],[2,16]]"], r"must begin with epoch 0 and its epochs must rise, got \[0, 2, 2\]."),
        (["[[0,8],[3,16]]"], r"at epoch 3, and task.epochs=3 ends the run before: raise task.epochs, or scale"),
        (["[[0,10],[1,16]]"], r"size 10 must be a multiple of model.patch_size=4, and at most model.img_size=16."),
        (["[[0,8],[1,20]]"], r"size 20 must be a multiple of model.patch_size=4, and at most model.img_size=16."),
        (["[[0,4],[1,16]]"], r"a mask ratio of 0.75 keeps 0 of the 1 patches of size 4: at least one must be kept"),
        (["[[0,8]]", "task.mask_ratio=[0.5,0.9]"], r"task.mask_ratio=\[0.5, 0.9\] draws a ratio for each batch, and"),
        (
            ["[[0,8,0.5]]", "model.decoder=cross", "task.predict_ratio=0.6"],
            r"task.predict_ratio=0.6 is above the mask ratio 0.5 of size 8 in task.img_size_schedule: more patches",
        ),
        (["[[0,small]]"], r"task.img_size_schedule must be .*, got \[\[0, 'small'\]\]."),
    ],
)
def test_schedules_that_cannot_be_are_refused_in_words(overrides, sentence):
    schedule, *more = overrides
    with pytest.raises(UserError, match=sentence):
        composed(*TINY_PRETRAIN, "task.epochs=3", f"task.img_size_schedule={schedule}", *more)


def test_the_planned_time_of_growing_images_is_the_mean_of_their_sizes():
    def images_a_second(*overrides: str) -> float:
        plan = report(composed(*TINY_PRETRAIN, "task.epochs=4", "estimate.tflops=1", *overrides))
        match = re.search(r"time .* ([\d,]+) images/s", plan)
        assert match, plan
        return float(match[1].replace(",", ""))

    small, large = images_a_second("model.img_size=8", "task.mask_ratio=0.5"), images_a_second("model.img_size=16")
    growing = images_a_second("model.img_size=16", "task.img_size_schedule=[[0,8,0.5],[3,16]]")
    assert small > 1.5 * large
    assert growing == pytest.approx(4 / (3 / small + 1 / large), rel=1e-4)
    cut_short = images_a_second("model.img_size=16", "task.img_size_schedule=[[0,8,0.5],[3,16]]", "task.max_steps=2")
    assert cut_short == pytest.approx(small, rel=1e-4)


def test_a_target_of_one_size_is_refused_and_so_is_another_schedule_in_a_run_that_has_begun(tmp_path, caplog):
    tokens = ["target=tokens", "target.file=none.pt", "dry_run=true"]
    with pytest.raises(UserError, match=r"changes the size of images, and target=tokens needs one: set task.img_size"):
        report(composed(*GROWING, *tokens))
    plain, growing = composed(*TINY_PRETRAIN, "task.epochs=3"), composed(*GROWING)
    assert not [key for key in identity(plain) if "img_size_schedule" in key] and identity(plain) != identity(growing)
    assert "image sizes" not in report(plain)
    assert "8 x 8 pixels from epoch 0 (mask ratio 0.5), 12 x 12 pixels from epoch 1 (mask ratio 0.75)" in report(
        growing
    )


# ---------------------------------------------------------------- runs


def test_a_run_resumes_in_any_phase_to_the_same_bits_and_is_cut_up(tmp_path):
    run_here(tmp_path / "whole", *GROWING)
    often = ["checkpoint.every_epochs=0.2", "checkpoint.keep=100", "data.num_workers=0"]
    run_here(tmp_path / "cut", *GROWING, *often)
    steps = len(losses(tmp_path / "whole"))
    for at in (7, 3):  # in the middle of the second size, and of the first
        shutil.copytree(tmp_path / "cut", tmp_path / str(at))
        resumed(tmp_path / str(at), [*GROWING, *often], at)
        assert losses(tmp_path / str(at)) == losses(tmp_path / "whole") and steps == 15
        assert weights(tmp_path / str(at)) == weights(tmp_path / "whole")
    run_here(tmp_path / "parts", *GROWING, "task.micro_batch_size=8")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_ranks_have_the_losses_of_one(tmp_path, sharding):
    overrides = [*GROWING, f"launcher.sharding={sharding}"]
    for world in (1, 2):
        on_ranks(world, tmp_path / str(world), functools.partial(trained, overrides=overrides))
    whole = test_distributed.losses(tmp_path / "1")
    assert len(whole) > 15 and test_distributed.losses(tmp_path / "2") == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["blocks", "model"])
def test_every_size_is_compiled_before_the_run(tmp_path, monkeypatch, level):
    tried: list[tuple[int, ...]] = []
    batch = compilation.Trial.batch

    def noted(trial: compilation.Trial, images: int, ratio: int = 0):
        result = batch(trial, images, ratio)
        tried.append((*result["image"].shape[2:],))
        return result

    run_here(tmp_path / "plain", *GROWING)
    torch._dynamo.reset()
    monkeypatch.setattr(compilation.Trial, "batch", noted)
    run_here(tmp_path / level, *GROWING, f"task.compile={level}")
    assert tried == [(8, 8), (12, 12), (16, 16)]
    assert "compiled" in (log := (tmp_path / level / "log.txt").read_text()) and "failed" not in log
    assert losses(tmp_path / level) == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    torch._dynamo.reset()


def test_the_largest_size_decides_what_fits(tmp_path, monkeypatch):
    sizes: list[tuple[int, ...]] = []
    batch = compilation.Trial.batch

    def noted(trial: compilation.Trial, images: int, ratio: int = 0):
        result = batch(trial, images, ratio)
        sizes.append((*result["image"].shape[2:],))
        return result

    monkeypatch.setattr(compilation.Trial, "batch", noted)
    run_here(tmp_path, *GROWING, "task.micro_batch_size=auto", "task.max_steps=1")
    assert sizes and set(sizes) == {(16, 16)}
