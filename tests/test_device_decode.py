"""Decoding on the device: on a CPU the same code gives the host's bits."""

import csv
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_PRETRAIN, composed, loader_arguments, run_here
from PIL import Image

from mae.config.build import build
from mae.data import SOURCES, device_decode, jpeg
from mae.data.loader import Loader
from mae.data.phases import Phase
from mae.data.source import Arrays
from mae.data.transforms import AUGMENTATIONS
from mae.errors import UserError
from mae.models.masking import bind_masking

CPU = torch.device("cpu")


def write_images(folder, *, damaged: bool = False) -> int:
    """Files that a GPU decodes and others; returns how many a GPU does not."""
    folder.mkdir(parents=True, exist_ok=True)
    random, smooth = np.random.default_rng(0), Image.Resampling.BICUBIC
    images = []
    for _ in range(20):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
        images.append(coarse.resize((int(random.integers(40, 90)), int(random.integers(40, 90))), smooth))
    for number, image in enumerate(images):
        image.convert("L" if number % 5 == 4 else "RGB").save(folder / f"{number:02}.jpg", quality=90)
    image = images[-1]
    image.save(folder / "progressive.jpg", progressive=True)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "plain.png")
    if damaged:
        (folder / "07.jpg").write_bytes(b"no image")
    return 3 + damaged


PHASES = (Phase(0, (16, 16), (1, 1), 0.0), Phase(1, (32, 32), (2, 2), 0.75))


def loader_of(root, decode_on, bad_csv=None, augmentation="pretrain", phases=(), **options):
    cfg = composed(
        "data=folder", f"data.root={root}", "data.img_size=32", "data.val_fraction=0.05", "data.max_bad_fraction=0.3",
        f"augmentation={augmentation}",
    )  # fmt: skip
    transform, masking = build(AUGMENTATIONS, cfg.augmentation), bind_masking(cfg.masking, (2, 2), 0.75)
    options = {**cfg.data, "num_workers": 0, "repeats": 1, **options}
    keys = ("num_workers", "workers", "prefetch", "timeout_s", "max_bad_fraction", "fraction", "per_class", "repeats")
    settings = {key: options[key] for key in keys}
    batches, loading = loader_arguments(8, 8, 0, 0, 1, {**settings, "masking": masking})
    by_phase = [build(AUGMENTATIONS, {**cfg.augmentation, "img_size": [*phase.size]}) for phase in phases]
    source, batches = build(SOURCES, cfg.data, "train"), replace(batches, phases=phases)
    return Loader(source, transform, batches, loading, bad_csv, False, by_phase, decode_on)


def counts_of(loader):
    assert loader._decoder is not None
    return loader._decoder.counts


def batches_of(loader):
    batches = [{**batch} for epoch in range(2) for step in loader.steps(epoch) for batch in step]
    loader.close()
    return batches


def assert_alike(actual, expected):
    assert len(actual) == len(expected) >= 4
    for ours, reference in zip(actual, expected, strict=True):
        assert ours.keys() == reference.keys()
        for name, tensor in reference.items():
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("options", [
    {}, {"phases": PHASES}, {"augmentation": "color_jitter"}, {"augmentation": "fixed_crop"}, {"repeats": 2},
    {"num_workers": 2, "workers": "thread"},
    pytest.param({"num_workers": 2, "workers": "process"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_same_samples_crops_and_masks_as_on_the_host(tmp_path, options, caplog):
    others = write_images(tmp_path / "images")
    with caplog.at_level(logging.INFO):
        device = loader_of(tmp_path / "images", CPU, **options)
        assert_alike(batches_of(device), batches_of(loader_of(tmp_path / "images", None, **options)))
    counts = counts_of(device)
    assert 0 < counts.by_host <= 2 * others and counts.all > 15
    assert f"the host decoded {counts.by_host} of {counts.all} images" in caplog.text


@pytest.mark.parametrize("repeats", [1, 2])
def test_files_that_the_device_refuses_are_judged_by_the_host(tmp_path, monkeypatch, repeats):
    """Grey files here, and one that is none: as a device says it of several files, and then of one."""
    write_images(tmp_path / "images", damaged=True)
    original = jpeg.all_on

    def refusing(device, files, grey):
        headers = [jpeg.read_header(bytearray(file.numpy().tobytes())) for file in files]
        if any(header is not None and header.components == 1 for header in headers):
            raise RuntimeError("nvJPEG does not decode one of these")
        return original(device, files, grey)

    monkeypatch.setattr(device_decode.jpeg, "all_on", refusing)
    loaders = {name: loader_of(tmp_path / "images", on, tmp_path / f"{name}.csv", repeats=repeats)
               for name, on in (("device", CPU), ("host", None))}  # fmt: skip
    assert_alike(batches_of(loaders["device"]), batches_of(loaders["host"]))
    assert (tmp_path / "device.csv").read_text() == (tmp_path / "host.csv").read_text()
    assert [row["name"] for row in csv.DictReader((tmp_path / "host.csv").open())] == ["07.jpg"]
    assert counts_of(loaders["device"]).by_host > 5


def test_memory_of_the_device_that_does_not_suffice_is_no_fault_of_an_image(tmp_path, monkeypatch):
    write_images(tmp_path / "images")

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_decode.jpeg, "all_on", full)
    with pytest.raises(torch.OutOfMemoryError):
        batches_of(loader_of(tmp_path / "images", CPU))


def test_what_cannot_be_decoded_on_the_device_is_refused(tmp_path):
    write_images(tmp_path / "images")
    with pytest.raises(UserError, match=r"data\.decode_device=cuda needs a GPU: use data\.decode_device=cpu with dev"):
        composed(*TINY_PRETRAIN, "data.decode_device=cuda")
    with pytest.raises(UserError, match=r"^data\.decode_device=cuda needs a GPU, and this run has cpu: set it to cpu"):
        run_here(tmp_path / "run", *TINY_PRETRAIN[:-5], "device=auto", "data.decode_device=cuda")
    with pytest.raises(UserError, match=r"crops on the GPU, and this augmentation works on the host: use data\.decode"):
        loader_of(tmp_path / "images", CPU, augmentation="finetune")
    arrays = Arrays(torch.zeros(4, 3, 8, 8), None, [], "")
    with pytest.raises(UserError, match=r"decodes JPEG files, and these images are none: use data\.decode_device=cpu"):
        device_decode.check(arrays, build(AUGMENTATIONS, composed("augmentation=pretrain").augmentation))
