"""What goes wrong while batches are made: bad images over ranks and epochs, memory, time, the decoder's library."""

import functools
import threading
import time
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_eval_loader, make_loader

from mae.data import jpeg, transforms, workers
from mae.data.batch_buffer import Stack
from mae.data.crops import resize
from mae.data.dataset import Reader
from mae.data.sampler import Batches, Ticket
from mae.data.source import Arrays, BadImage

LOADING = {"prefetch": 2, "timeout_s": 60.0, "workers": "thread", "num_workers": 0}
TRAINING = LOADING | {"fraction": 1.0, "per_class": None}


class Spoilt(Arrays):
    """Grey images, some of which cannot be used."""

    def __init__(self, count: int, bad: Iterable[int], error: type[Exception] = BadImage):
        super().__init__(torch.zeros(count, 1, 4, 4, dtype=torch.uint8), None, [], "spoilt")
        self.spoilt, self.error = set(bad), error

    def __getitem__(self, index):
        if index in self.spoilt:
            raise self.error("empty") if self.error is BadImage else self.error()
        return super().__getitem__(index)


def whole():
    return transforms.CenterCrop(img_size=4, crop_fraction=1.0)


def training(source, rank=0, world=1, batch_size=40, max_bad_fraction=0.01, repeats=1, **changes):
    options = TRAINING | {"repeats": repeats, "max_bad_fraction": max_bad_fraction} | changes
    return make_loader(source, whole(), batch_size, batch_size // world, 0, rank, world, **options)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_stops_in_its_first_epoch_of_bad_files(rank, repeats):
    source = Spoilt(4000, range(0, 4000, 33))  # 3 %
    loader = training(source, rank, 2, repeats=repeats)
    says = (
        r"of the \d+ images read so far cannot be used, more than data.max_bad_fraction=0.01 allows; the first: spoilt/"
    )
    with pytest.raises(ValueError, match=says):
        for step in loader.steps(0):
            list(step)


@pytest.mark.parametrize(("world", "repeats", "epochs"), [(1, 1, 3), (2, 1, 3), (2, 2, 3), (3, 1, 1)])
def test_an_image_counts_once_however_often_it_is_read(world, repeats, epochs):
    source = Spoilt(240, [7, 9])
    loader = training(source, 0, world, batch_size=24, repeats=repeats, max_bad_fraction=0.5)
    read = set()
    for epoch in range(epochs):
        for step in loader.steps(epoch):
            read |= {int(i) for batch in step for i in batch["index"]}
    assert loader.record.seen == len(read | set(loader.record.bad)) <= 240


def test_a_rank_that_evaluates_judges_its_part_of_the_images():
    source = Spoilt(400, range(0, 400, 20))  # all of them rank 0's: 10 % of its part
    loaders = [
        make_eval_loader(source, whole(), 10, 10, 0, rank, 2, max_bad_fraction=0.06, **LOADING) for rank in (0, 1)
    ]
    with pytest.raises(ValueError, match="images read so far cannot be used, more than data.max_bad_fraction=0.06"):
        list(loaders[0])
    assert len(list(loaders[1])) == 20


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_an_image_that_takes_too_much_memory_is_a_bad_file(kind, tmp_path):
    source = Spoilt(40, [3], MemoryError)
    listed = tmp_path / "bad_files.csv"
    loader = training(source, max_bad_fraction=0.1, workers=kind, num_workers=1, bad_csv=listed)
    (batch,) = next(loader.steps(0))
    loader.close()
    assert 3 not in batch["index"] and len(batch["index"]) == 40
    assert "3,spoilt/3,it takes more memory than there is,train" in listed.read_text()


class Failing(transforms.Transform):
    """A transform for which there is no memory."""

    def __init__(self, error: Exception | None):
        self.error = error

    def __call__(self, image, draw, out=None):
        if self.error is not None:
            raise self.error
        return torch.empty(1 << 50, dtype=torch.uint8)


class FailsOnBlack(Failing):
    def __call__(self, image, draw, out=None):
        return super().__call__(image, draw) if int(image.max()) == 0 else image


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize(("error", "says"), [
    (None, "it takes more memory than there is"),
    (MemoryError(), "it takes more memory than there is"),
    (RuntimeError("Input size\nis odd"), "RuntimeError: Input size"),
])  # fmt: skip
def test_an_image_whose_transform_fails_is_a_bad_file(kind, error, says, repeats, tmp_path):
    images = torch.full((40, 3, 8, 8), 9, dtype=torch.uint8)
    images[3] = 0
    options = LOADING | {"workers": kind, "num_workers": 1, "repeats": repeats, "fraction": 1.0, "per_class": None}
    path = tmp_path / "bad_files.csv"
    source = Arrays(images, None, [], "images")
    loader = make_loader(source, FailsOnBlack(error), 40, 40, 0, bad_csv=path, max_bad_fraction=0.1, **options)
    batches = [batch for epoch in range(repeats) for step in loader.steps(epoch) for batch in step]
    loader.close()
    assert len(batches) == repeats
    assert all(3 not in batch["index"] and batch["image"].unique().tolist() == [9] for batch in batches)
    assert f"3,images/3,{says},train" in path.read_text()
    with pytest.raises(ValueError, match=r"\d+ images in a row cannot be used, the first of them images/"):
        Reader(source, Failing(RuntimeError("a bug")), Batches(1, 1, 0))[Ticket(0, np.arange(4), 1.0)]


def test_a_batch_that_does_not_come_is_told_on_every_python(monkeypatch):
    class Earlier(Exception):
        """concurrent.futures.TimeoutError before Python 3.11."""

    def hangs():
        raise Earlier
        yield

    monkeypatch.setattr(workers, "FutureTimeoutError", Earlier)
    with pytest.raises(ValueError, match=r"no batch came within data\.timeout_s=5 s: the storage under data\.root"):
        workers.received(hangs(), training(Spoilt(40, [])).record, 5.0)


def test_the_cores_of_a_step_are_shared_by_its_tasks(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert workers.worker_count(None) == 64 and workers.worker_count(3) == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert workers.worker_count(None) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.worker_count(None) == 2


def test_threads_load_the_decoders_library_once(monkeypatch):
    loads = []

    @functools.cache
    def load():
        loads.append(1)
        time.sleep(0.05)

    monkeypatch.setattr(jpeg, "_load", load)
    threads = [threading.Thread(target=jpeg._library) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [1]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError])
@pytest.mark.parametrize("place", ["parse", "decode", "copy"])
def test_a_part_that_cannot_be_decoded_is_left_to_the_whole(monkeypatch, error, place):
    def fails(*given, **more):
        raise error("as C++ throws it")

    image = type("Pixels", (), {"__array__": fails})()
    decoder = SimpleNamespace(decode=fails if place == "decode" else lambda *given, **more: image)
    library = SimpleNamespace(
        CodeStream=fails if place == "parse" else lambda data: SimpleNamespace(get_sub_code_stream=lambda region: None),
        Region=lambda *box: box,
        ColorSpec=SimpleNamespace(SRGB=0, GRAY=1),
        DecodeParams=lambda **given: given,
    )
    monkeypatch.setattr(jpeg, "_library", lambda: library)
    monkeypatch.setattr(jpeg, "DECODERS", SimpleNamespace(decoder=decoder))
    assert jpeg.region(bytearray(b""), False, (0, 0, 1, 1)) is None


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_images_resized_into_their_batch_are_those_resized_alone(channels, kind, last):
    chance = np.random.default_rng(0)
    stack, alone = Stack(5), []
    for k, (height, width) in enumerate([(9, 14), (8, 6), (20, 7), (8, 6), (5, 5)]):
        shape = (height, width, channels) if last else (channels, height, width)
        image = torch.from_numpy(chance.integers(0, 200, shape)).to(kind)
        image = image.permute(2, 0, 1) if last else image
        alone.append(resize(image, (8, 6)))
        room = stack.row(k)
        made = resize(image, (8, 6), room)
        if k == 2:  # written straight to its place where the kernel leaves colours side by side
            assert room is not None
            assert (made.data_ptr() == room.data_ptr()) == (channels in (3, 4) and kind == torch.uint8)
        stack.put(k, made)
    assert stack.tensor is not None
    assert torch.equal(stack.tensor, torch.stack(alone)) and stack.tensor.dtype == kind


class Alone(transforms.RandomResizedCrop):
    """Never writes to its row of the batch."""

    def __call__(self, image, draw=None, out=None):
        return super().__call__(image, draw)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_batch_made_in_place_is_the_one_made_image_by_image(kind):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 3, 20, 30), np.uint8))
    source = Arrays(pixels, None, [], "noise")
    crop = transforms.RandomResizedCrop(img_size=8, scale=[0.2, 1.0], ratio=[0.75, 4 / 3], min_crop=0.0, hflip=False)
    options = {"num_workers": 1, "workers": kind, "repeats": 2, "max_bad_fraction": 0.0}
    loader = make_loader(source, crop, 8, 8, 0, **(TRAINING | options))
    (batch,) = next(loader.steps(0))
    loader.close()
    alone = Alone(img_size=8, scale=[0.2, 1.0], ratio=[0.75, 4 / 3], min_crop=0.0, hflip=False)
    plain = Reader(source, alone, Batches(1, 1, 0, repeats=2)).load(Ticket(0, batch["index"][:4].numpy(), 1.0)).batch
    assert torch.equal(batch["image"], plain["image"]) and len(batch["image"]) == 8
