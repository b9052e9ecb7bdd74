"""What the placeholders of the documentation's commands name: images, files and runs, all of them small."""

import shutil
from pathlib import Path

import numpy as np
import torch
from conftest import TINY, TINY_PRETRAIN, run_here
from PIL import Image
from torch import Tensor, nn

from mae.data import pack

FAST = ["task.max_steps=1", "task.warmup_epochs=0", "task.batch_size=8"]


def photos(folder: Path, count: int = 8, size: tuple[int, int] = (40, 32)) -> None:
    """Pictures of three classes that differ by their colour."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir(parents=True)
        for number in range(1, count + 1):
            pixels = noise.integers(0, 80, (*size[::-1], 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


class Tokenizer(nn.Module):
    """16 steps of the brightness of patches of 4 pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return (16 * nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)).long().clamp(0, 15).flatten(1)


def make_data(folder: Path) -> None:
    """Photos, ImageNet's layout, scenes of 12 channels, maps of classes, a tokenizer, and groups of a user's own."""
    photos(folder / "photos")
    (folder / "flat").mkdir()
    Image.new("RGB", (40, 32), "red").save(folder / "flat" / "a.jpg")  # beside sub-folders it would end their labels
    photos(folder / "imagenet" / "train")
    photos(folder / "imagenet" / "val", count=2)
    (folder / "more").mkdir()
    Image.new("RGB", (40, 32), "blue").save(folder / "more" / "b.png")
    noise = np.random.default_rng(0)
    for k in range(24):
        name = folder / "scenes" / "ab"[k % 2] / f"{k}.npy"
        name.parent.mkdir(parents=True, exist_ok=True)
        np.save(name, noise.integers(0, 9000, (12, 32, 32), dtype=np.uint16))
        (folder / "bands").mkdir(exist_ok=True)
        np.save(folder / "bands" / f"{k}.npy", noise.integers(0, 9000, (4, 32, 32), dtype=np.uint16))
    for split, count in (("train", 9), ("val", 2)):
        for kind, shape, suffix in (("images", (32, 32, 3), "jpg"), ("masks", (32, 32), "png")):
            (folder / "maps" / kind / split).mkdir(parents=True)
            for k in range(count):
                pixels = noise.integers(0, 3, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "maps" / kind / split / f"{k}.{suffix}")
    (folder / "maps" / "classes.txt").write_text("a\nb\nc\n")
    torch.jit.save(torch.jit.trace(Tokenizer(), torch.rand(2, 3, 16, 16)), str(folder / "FILE"))
    (folder / "my_conf" / "data").mkdir(parents=True)
    (folder / "my_conf" / "data" / "mine.yaml").write_text("defaults: [digits, _self_]\n")


def make_runs(folder: Path) -> None:
    """Runs of each kind that a command goes on with."""
    often = ["checkpoint.every_epochs=1", "checkpoint.keep=9"]
    assert run_here(folder / "RUN", *TINY_PRETRAIN, *often, "model.depth=4") == 0
    assert (
        run_here(folder / "CLASSIFIER", "task=finetune", f"init={folder / 'RUN'}", *TINY, "model.depth=4", *FAST) == 0
    )
    large = [*TINY_PRETRAIN, "task.max_steps=1", "data.img_size=224", "model.patch_size=16"]
    assert run_here(folder / "RUN_224", *large, "task.batch_size=2") == 0
    scenes = ["data=digit_scenes", "data.canvas=24", "data.img_size=24", "data.scenes=24", "data.val_scenes=5"]
    tiny = [override for override in TINY if not override.startswith("data.")]
    assert run_here(folder / "SEGMENT_RUN", "task=segment", *tiny, *scenes, *FAST) == 0
    assert run_here(folder / "STATS", "task=stats", "target=pca", "data.fraction=0.1", "device=cpu") == 0
    shutil.copytree(folder / "RUN", folder / "INTERRUPTED")
    (folder / "INTERRUPTED" / "summary.json").unlink()
    shutil.rmtree(max((folder / "INTERRUPTED" / "checkpoints").glob("step_*")))
    diverging = ["optimizer=sgd", "optimizer.base_lr=1e30", "task.max_bad_steps=2", "task.epochs=9"]
    assert run_here(folder / "DIVERGED", *TINY_PRETRAIN, *diverging) == 3
    pack.main([str(folder / "shards"), "data=folder", f"data.root={folder / 'photos'}"])


FAST = ["task.max_steps=1", "task.warmup_epochs=0", "task.batch_size=8"]
