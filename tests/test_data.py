"""Sampling and loading: every image once, weights that sum to one, the same bits however they were made."""

import random
import subprocess
import sys
import threading
import time
from importlib.metadata import PathDistribution
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, first_digits, labels_of, make_eval_loader, make_loader, of_type, random_noise
from hypothesis import given, settings
from hypothesis import strategies as st

from mae import rng
from mae.data import crops, transforms
from mae.data.dataset import Reader
from mae.data.prepare import flipped
from mae.data.sampler import Batches, Sampler, Ticket
from mae.data.source import Arrays
from mae.data.sources.torchvision import digits, read_digits
from mae.data.subsets import Subset, reduced, split_indices

# three workers on two cores is what is tested
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

OPTIONS = {"prefetch": 2, "timeout_s": 60.0, "workers": "process", "max_bad_fraction": 0.01}
TRAINING = OPTIONS | {"repeats": 1, "fraction": 1.0, "per_class": None}


@pytest.fixture(scope="module")
def source():
    return first_digits(90)


def crop():
    return transforms.RandomResizedCrop(img_size=16, scale=[0.2, 1.0], ratio=[0.75, 1.33], min_crop=0.0, hflip=True)


def make(source, num_workers=0, seed=3, batch_size=24, micro_batch_size=8, **changes):
    runtime: dict[str, Any] = {"masking": random_noise(16), "rank": 0, "world": 1, "drop_last": False}
    runtime |= {k: changes.pop(k) for k in list(changes) if k in runtime}
    options: dict[str, Any] = TRAINING | {"num_workers": num_workers} | changes
    transform = options.pop("transform", None) or crop()
    return make_loader(source, transform, batch_size, micro_batch_size, seed, **runtime, **options)


def stream(loader, epochs=(0, 1), start=0):
    """All batches of some epochs, the first from a step on."""
    found = []
    for epoch in epochs:
        for step in loader.steps(epoch, start if epoch == epochs[0] else 0):
            found.append(list(step))
            assert len(found[-1]) == len(step)
    loader.close()
    return found


def same(a, b):
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert len(one) == len(two)
        for x, y in zip(one, two, strict=True):
            assert x.keys() == y.keys()
            assert all(torch.equal(x[k], y[k]) for k in x)


# ---------------------------------------------------------------- sampler

SIZES = {
    "count": st.integers(1, 200),
    "micro": st.integers(1, 12),
    "accumulation": st.integers(1, 4),
    "world": st.integers(1, 5),
    "epoch": st.integers(0, 4),
    "seed": st.integers(0, 2**32 - 1),
}


@given(**SIZES)
@settings(max_examples=200)
def test_each_image_once_and_weights_sum(count, micro, accumulation, world, epoch, seed):
    batch = micro * accumulation * world
    ranks = [Sampler(count, Batches(batch, micro, seed, r, world)) for r in range(world)]
    seen = []
    for step in range(ranks[0].steps_per_epoch):
        tickets = [rank.micro_batches(epoch, step) for rank in ranks]
        assert {len(t) for t in tickets} == {ranks[0].micro_steps(step)}
        counted = [t for rank in tickets for t in rank if t.weight > 0]
        assert all(0 < len(t.indices) <= micro for rank in tickets for t in rank)
        # the mean over ranks of the weighted sum of means is the mean over the step's images
        total = sum(t.weight * t.indices.mean() for t in counted) / world
        images = np.concatenate([t.indices for t in counted])
        assert total == pytest.approx(images.mean())
        assert sum(t.weight for t in counted) == pytest.approx(world)
        seen.extend(images.tolist())
    assert sorted(seen) == list(range(count))


@given(**SIZES)
@settings(max_examples=50)
def test_a_step_holds_the_same_images_on_any_number_of_ranks(count, micro, accumulation, world, epoch, seed):
    batch = micro * accumulation * world
    one = Sampler(count, Batches(batch, micro, seed))
    ranks = [Sampler(count, Batches(batch, micro, seed, r, world)) for r in range(world)]
    for step in range(one.steps_per_epoch):
        alone = np.concatenate([t.indices for t in one.micro_batches(epoch, step) if t.weight])
        shared = [t.indices for r in ranks for t in r.micro_batches(epoch, step) if t.weight]
        assert sorted(alone) == sorted(np.concatenate(shared))


@given(seed=st.integers(0, 2**32 - 1), repeats=st.integers(2, 4), steps=st.integers(1, 5), rest=st.integers(0, 7))
@settings(max_examples=50)
def test_repeats_go_through_all_images_in_as_many_epochs(seed, repeats, steps, rest):
    batch = 4 * repeats
    sampler = Sampler(batch * steps + rest % batch, Batches(batch, batch, seed, repeats=repeats))
    images = [sampler.step_indices(e, s) for e in range(repeats) for s in range(sampler.steps_per_epoch)]
    assert all(len(i) == 4 for i in images)
    images = np.concatenate(images)
    assert len(set(images.tolist())) == len(images) == steps * batch


def test_orders_differ_by_epoch_and_seed():
    orders = [Sampler(100, Batches(100, 100, seed)).step_indices(epoch, 0) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_tickets_go_on_where_they_are_told():
    sampler = Sampler(20, Batches(6, 2, 1))
    tickets = sampler.tickets(0, 0)
    whole = [next(tickets) for _ in range(25)]
    skipped = sum(sampler.micro_steps(s) for s in range(2))
    tail = sampler.tickets(0, 2)
    for ticket in whole[skipped:]:
        assert (ticket.indices == next(tail).indices).all()


@pytest.mark.parametrize("key", ["task.batch_size", "task.micro_batch_size"])
def test_repeats_must_divide(key):
    sizes = (9, 4) if key == "task.batch_size" else (12, 6)
    with pytest.raises(ValueError, match=f"{key}.*data.repeats"):
        Sampler(100, Batches(*sizes, 0, repeats=4))


def test_drop_last_refuses_a_batch_larger_than_the_data():
    assert Sampler(10, Batches(4, 4, 0, drop_last=True)).steps_per_epoch == 2
    with pytest.raises(ValueError, match="task.batch_size=20 is more than the 10 images"):
        Sampler(10, Batches(20, 20, 0, drop_last=True))


# ---------------------------------------------------------------- loader


def test_batches_do_not_depend_on_workers(source):
    alone = stream(make(source))
    assert alone[0][0]["image"].shape == (8, 3, 16, 16)
    assert alone[0][0]["noise"].shape == (8, 16)
    assert alone[0][0]["flip"].dtype == torch.bool
    for workers in (1, 3):
        same(alone, stream(make(source, workers)))
        same(alone, stream(make(source, workers, workers="thread")))


@pytest.mark.parametrize("workers", [0, 2])
def test_restart_in_the_middle_of_an_epoch_gives_the_tail(source, workers):
    whole = stream(make(source))
    same(whole[2:], stream(make(source, workers), start=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_left_midway_starts_anew(source, workers):
    whole = stream(make(source))
    loader = make(source, workers)
    for step in loader.steps(0):
        next(iter(step))
        break  # in the middle of a step, with batches on their way
    same(whole, stream(loader))


def test_threads_end_when_their_batches_are_no_longer_wanted(source):
    def count():
        return sum(t.name.endswith("(_work)") for t in threading.enumerate())

    loader, before = make(source, 2, workers="thread"), count()
    whole = stream(make(source))
    for step in loader.steps(0):
        next(iter(step))
        assert count() == before + 2
        break
    same(whole, stream(loader))
    time.sleep(0.2)
    assert count() <= before  # an earlier test's thread may hang for a while, as it is meant to


LEAVES_EARLY = """
import sys
import torch
sys.path.insert(0, "tests")
from test_data import make
from mae.data.source import Arrays

class Slow(Arrays):
    def __getitem__(self, index):
        torch.ops.aten.mm(torch.ones(700, 700), torch.ones(700, 700))  # without Python's lock, as decoders work
        return super().__getitem__(index)

loader = make(Slow(torch.zeros(400, 1, 20, 20, dtype=torch.uint8), None, [], "slow"), 2, workers="thread")
for step in loader.steps(0):
    next(iter(step))
    break
loader.close()
"""


def test_a_program_that_ends_while_threads_make_batches_ends_well():
    # Python aborts where it ends while a daemon thread is about to come back from C++
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", LEAVES_EARLY], capture_output=True, text=True, cwd=ROOT)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_a_step_not_read_to_its_end_does_not_shift_the_next(source):
    whole = stream(make(source), epochs=(0,))
    loader = make(source, 1)
    first = [next(iter(step)) for step in loader.steps(0)]
    loader.close()
    same([w[:1] for w in whole], [[f] for f in first])


def test_ranks_together_make_the_batches_of_one(source):
    alone = stream(make(source), epochs=(0,))
    ranks = [stream(make(source, rank=r, world=3), epochs=(0,)) for r in range(3)]
    for step, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        whole = {int(i): image for b in step for i, image in zip(b["index"], b["image"], strict=True)}
        for batch in (b for part in parts for b in part if b["weight"] > 0):
            for i, image in zip(batch["index"], batch["image"], strict=True):
                assert torch.equal(image, whole.pop(int(i)))
        assert not whole


def test_the_main_process_generators_are_left_alone(source):
    def states():
        return (
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
            torch.get_rng_state().tolist(),
        )

    before = states()
    transform = transforms.RandAugment(
        img_size=16,
        scale=[0.2, 1.0],
        ratio=[0.75, 1.33],
        min_crop=0.0,
        hflip=True,
        policy="rand-m9-mstd0.5-inc1",
        erase_prob=1.0,
        mean=[0.5],
        std=[0.25],
    )
    a = stream(make(source, transform=transform))
    assert states() == before
    with pytest.raises(ValueError, match="data.workers=thread"):
        make(source, 2, transform=transform, workers="thread")
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    same(a, stream(make(source, 2, transform=transform)))


def test_repeats_decode_once_and_crop_anew(source):
    batch = stream(make(source, repeats=4), epochs=(0,))[0][0]
    assert batch["index"].tolist() == batch["index"][:2].tolist() * 4
    crops = batch["image"][::2]
    assert len({c.numpy().tobytes() for c in crops}) == 4
    assert len({n.numpy().tobytes() for n in batch["noise"]}) == 8


def test_evaluation_sees_each_image_once_without_padding(source):
    whole = transforms.CenterCrop(img_size=16, crop_fraction=1.0)
    for world in (1, 4, 100):
        seen = []
        for rank in range(world):
            loader = make_eval_loader(source, whole, 7, 7, 0, rank, world, num_workers=0, **OPTIONS)
            batches = list(loader)
            assert len(batches) == len(loader)
            seen += [i for b in batches for i in b["index"].tolist()]
        assert sorted(seen) == list(range(len(source)))


def test_evaluation_repeats_itself(source):
    whole = transforms.CenterCrop(img_size=16, crop_fraction=1.0)
    loader = make_eval_loader(source, whole, 32, 32, 5, masking=random_noise(9), num_workers=2, **OPTIONS)
    next(iter(loader))  # left midway
    same([list(loader)], [list(loader)])
    loader.close()


# ---------------------------------------------------------------- subsets and splits


@pytest.mark.parametrize("file", ["sklearn/datasets/data/digits.csv.gz", "moved.csv.gz"])
def test_digits_are_those_of_scikit_learn(file, monkeypatch):
    from sklearn.datasets import load_digits

    locate = PathDistribution.locate_file
    monkeypatch.setattr(PathDistribution, "locate_file", lambda package, path: locate(package, file))
    images, classes = read_digits()
    expected, labels = load_digits(return_X_y=True)
    assert images.shape == (1797, 8, 8) and (images.reshape(1797, 64) == np.asarray(expected)).all()
    assert classes.dtype == np.int64 and (classes == np.asarray(labels)).all()


def test_digits_are_split_by_class_without_overlap():
    parts = [digits(split, in_chans=1, val_fraction=0.2) for split in ("train", "val")]
    assert len(parts[0]) + len(parts[1]) == 1797
    assert abs(len(parts[1]) - 359.4) < 5
    counts = [np.bincount(labels_of(p)) for p in parts]
    assert np.allclose(counts[1] / (counts[0] + counts[1]), 0.2, atol=0.005)
    assert parts[0][0][0].shape == (1, 8, 8)
    image, label = parts[0][5]
    assert image.dtype == torch.uint8 and image.max() == 255 and label in range(10)


@given(count=st.integers(2, 300), fraction=st.floats(0.01, 0.99), classes=st.integers(1, 5))
@settings(max_examples=50)
def test_split_parts_are_complements(count, fraction, classes):
    for labels in (None, np.arange(count) % classes):
        train, val = (split_indices(labels, count, fraction, s) for s in ("train", "val"))
        assert sorted([*train, *val]) == list(range(count))


@pytest.mark.parametrize("each", [3, 4, 5, 7, 14])
def test_of_small_classes_as_many_are_held_out_as_is_asked_for(each):
    labels = np.repeat(np.arange(200), each)
    val = split_indices(labels, len(labels), 0.1, "val")
    assert abs(len(val) - 20 * each) <= 0.1 * 20 * each
    assert np.bincount(labels[val]).max() <= -(-each // 10) + 1


def test_reduced_sets_are_nested(source):
    small, large, few, more = (
        of_type(Subset, reduced(source, fraction, per_class, 0))
        for fraction, per_class in ((0.2, None), (0.5, None), (1.0, 2), (1.0, 3))
    )
    assert len(small) == 18 and len(large) == 45
    assert set(small.indices) < set(large.indices)
    assert np.bincount(labels_of(few)).tolist() == [2] * 10
    assert set(few.indices) < set(more.indices)
    assert few.name(0).startswith("digits/")
    unlabelled = Arrays(source.images, None, [], "x")
    with pytest.raises(ValueError, match="data.per_class needs labels"):
        reduced(unlabelled, 1.0, 2, 0)


# ---------------------------------------------------------------- targets that are no classes


class Mapped(Arrays):
    """Images of two channels with the coordinates of each pixel, and the same as a map; or a vector."""

    def __init__(self, shape, vectors=False):
        height, width = shape
        rows = torch.arange(height, dtype=torch.float32)[:, None].expand(shape)
        columns = torch.arange(width, dtype=torch.float32).expand(shape)
        super().__init__(torch.stack([rows, columns])[None].expand(30, -1, -1, -1), None, [], "mapped")
        self.vectors = vectors

    def __getitem__(self, index):
        image = super().__getitem__(index)[0]
        return image, torch.full((4,), index / 2) if self.vectors else image.clone()


def augmentations():
    crop: dict[str, Any] = {
        "img_size": [12, 18],
        "scale": [0.2, 1.0],
        "ratio": [0.75, 4 / 3],
        "min_crop": 0.0,
        "hflip": True,
    }
    fixed: dict[str, Any] = {"img_size": [12, 18], "crop_fraction": 0.8}
    return {
        "random_resized_crop": transforms.RandomResizedCrop(**crop),
        "fixed_crop": transforms.FixedCrop(**fixed, hflip=True),
        "center_crop": transforms.CenterCrop(**fixed),
    }


@given(height=st.integers(12, 90), width=st.integers(18, 90), index=st.integers(0, 10**6))
@pytest.mark.parametrize("name", augmentations())
@settings(max_examples=60)
def test_a_map_stays_aligned_with_its_image(name, height, width, index):
    transform, source = augmentations()[name], Mapped((height, width))
    key = rng.keys(0, 0, np.array([index]))
    draw = transforms.Draw(rng.uniform(key, transforms.DRAWS)[0].tolist(), int(key[0]))
    box = transform.box(draw)
    image, target = source.region(0, box) if box else source[0]
    assert isinstance(target, torch.Tensor)
    crop, nearest = transform(image, draw), transform.target(target, draw)
    assert nearest.shape == crop.shape == (2, 12, 18)
    assert set(nearest[0].unique().tolist()) <= set(target[0].unique().tolist())  # values are copied, never mixed
    steps = [max(1.0, float((nearest[k].max() - nearest[k].min()) / (s - 1))) for k, s in enumerate((12, 18))]
    inner = slice(None), slice(3, -3), slice(3, -3)  # where antialiasing does not reach over the border
    for k in range(2):  # a pixel's centre lies in the pixel whose value the map has
        assert (crop[inner][k] - nearest[inner][k]).abs().max() <= 0.5 + 0.01 * steps[k]
    if name == "random_resized_crop" and image.shape[1:] == (12, 18):
        assert torch.equal(crop, nearest)


@pytest.mark.parametrize("size", [(5, 7), (10, 14), (23, 3), (64, 64)])
def test_maps_are_resized_as_torchs_nearest_exact_has_it(size):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 2**15, (10, 14)).astype(np.int16))
    exact = torch.nn.functional.interpolate(values[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    assert torch.equal(crops.nearest(values, size), exact.to(torch.int16))
    assert torch.equal(crops.nearest(values, size, (1, 1, 3, 2)), exact[1:4, 1:3].to(torch.int16))


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("name", augmentations())
def test_every_way_of_loading_carries_targets(name, repeats, vectors):
    source, transform = Mapped((40, 30), vectors), augmentations()[name]
    options: dict[str, Any] = {"transform": transform, "repeats": repeats, "batch_size": 8, "micro_batch_size": 4}
    alone = stream(make(source, **options), epochs=(0,))
    for workers in ("thread", "process"):
        same(alone, stream(make(source, 2, **options, workers=workers), epochs=(0,)))
    batch = alone[0][0]
    if vectors:
        assert torch.equal(batch["label"], (batch["index"] / 2)[:, None].expand(-1, 4))
        assert torch.equal(flipped(batch["label"], batch["flip"]), batch["label"])
    else:
        images, maps = (flipped(batch[key], batch["flip"]) for key in ("image", "label"))
        assert (images - maps)[..., 3:-3, 3:-3].abs().max() < 0.6
        assert torch.equal(maps[batch["flip"]], batch["label"][batch["flip"]].flip(-1))
    for workers in (0, 2):
        loader = make_eval_loader(source, augmentations()["center_crop"], 7, 7, 0, num_workers=workers, **OPTIONS)
        batches = list(loader)
        loader.close()
        assert [len(b["label"]) for b in batches] == [7, 7, 7, 7, 2]
        assert vectors or (batches[0]["image"] - batches[0]["label"])[..., 3:-3, 3:-3].abs().max() < 0.6


def test_a_map_of_another_size_makes_its_image_bad_and_one_of_another_type_ends_the_run():
    class Odd(Mapped):
        def __getitem__(self, index):
            image = super().__getitem__(index)[0]
            target = image.clone()
            return image, target[:, 1:] if index == 3 else target.int() if index == 4 and self.vectors else target

    transform = augmentations()["center_crop"]
    reader = Reader(Odd((40, 30)), transform, Batches(1, 1, 0))
    loaded = reader.load(Ticket(0, np.arange(4), 1.0))
    assert [bad.reason for bad in loaded.bad] == ["its target is a map of 39 x 30 pixels, and the image has 40 x 30"]
    with pytest.raises(ValueError, match="mapped/0 holds float32 and mapped/4 int32: all files must be of one type"):
        Reader(Odd((40, 30), vectors=True), transform, Batches(1, 1, 0)).load(Ticket(0, np.array([0, 4]), 1.0))


def test_an_augmentation_that_turns_images_refuses_maps():
    normal: dict[str, Any] = {"mean": [0.5], "std": [0.25]}
    crop: dict[str, Any] = {"img_size": 16, "scale": [0.2, 1.0], "ratio": [0.75, 1.33], "min_crop": 0.0, "hflip": True}
    transform = transforms.RandAugment(**crop, **normal, policy="rand-m9-mstd0.5-inc1", erase_prob=0.5)
    with pytest.raises(ValueError, match="maps of these images cannot follow: choose augmentation=linprobe"):
        transform.target(torch.zeros(5, 5), transforms.Draw([0.0] * transforms.DRAWS, 0))
