"""Loading speed (rows 6 to 8 of the scoreboard): `python benchmarks/loader.py DIR [--json FILE]`.

Ours and the peer take turns, each with the same number of workers, from the same photos:
  peer   ImageFolder + PIL + the reference's transform (random resized crop .2-1, bicubic; flip; float; normalised)
  row 6  ours from the same files, decoded exactly as PIL does
  row 7  ours from shards of images re-encoded with a shorter side of 256 pixels (the inputs change)
  row 8  the same with four crops a decoded image
Ours hands out bytes; flip and normalisation, which ours leaves to the device, are timed by themselves.
Absolute figures of a shared machine mean little; the ratios are those of the medians over the rounds.
"""

import argparse
import functools
import itertools
import json
import logging
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from machine import machine
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from mae.data.decode import Decoder
from mae.data.loader import Loader
from mae.data.pack import Form, pack
from mae.data.prepare import Prepare
from mae.data.sampler import Batches
from mae.data.settings import LoaderSettings, StoreSettings
from mae.data.shards.layout import Layout
from mae.data.shards.source import tar_shards
from mae.data.source import Source
from mae.data.sources.folder import Files
from mae.data.sources.listing import scan
from mae.data.subsets import Subset
from mae.data.transforms import RandomResizedCrop
from mae.models.masking import random_masking
from mae.runs.environment import revision

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MAX_PIXELS = 178956970
Speeds = dict[str, list[tuple[float, float]]]  # name -> (images a second, CPU ms an image) a round
GOALS = {6: 2.8, 7: 6.0, 8: 10.0}


def peer(folder: Path, images: int, batch: int, workers: int) -> Iterator[int]:
    """Images in each batch of the reference's way of loading."""
    steps = [
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    sampler = RandomSampler(data, replacement=True, num_samples=images)
    loader = DataLoader(data, batch, sampler=sampler, num_workers=workers, drop_last=True)
    for pixels, _ in loader:
        yield len(pixels)


def ours(source: Source, images: int, batch: int, workers: int, repeats: int = 1) -> Iterator[int]:
    """Images in each batch of our way of loading."""
    transform = RandomResizedCrop(img_size=224, scale=[0.2, 1.0], ratio=[0.75, 4 / 3], min_crop=0.0, hflip=True)
    training = {"fraction": 1.0, "per_class": None, "repeats": repeats, "decode_device": "cpu"}
    settings = LoaderSettings(workers, "auto", 2, 120.0, 0.0, **training)
    masking = functools.partial(random_masking, grid=(14, 14), mask_ratio=0.75)
    tiled = Subset(source, np.tile(np.arange(len(source)), -(-images // len(source))))  # so that a round is long enough
    loader = Loader(
        tiled,
        transform,
        Batches(batch, batch, seed=0, masking=masking),
        settings,
    )
    for step in itertools.islice(loader.steps(0), images // batch):
        for micro_batch in step:
            yield len(micro_batch["image"])
    loader.close()


def speed(batches: Iterator[int], workers: int) -> tuple[float, float]:
    """(images a second, milliseconds of CPU an image).

    The rate is taken from each worker's first batch to the last batch of all, so that it counts neither the workers'
    start nor their end. CPU time is that of all threads and processes; other programs disturb it less.
    """
    busy, counts, times = cpu_seconds(), [], []
    for count in batches:
        counts.append(count)
        times.append(time.perf_counter())
    spent = times[-1] - times[workers - 1]  # by then each has made one, and shows it the sooner the more are made
    return sum(counts[workers:]) / spent, (cpu_seconds() - busy) / sum(counts) * 1e3


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def unlike_pillow(folder: Path) -> int:
    """Photos whose pixels differ from PIL's, decoded whole or as a region alone; 0 is expected."""
    data, decoder, count = datasets.ImageFolder(str(folder)), Decoder(3, False, MAX_PIXELS), 0
    for path, _ in data.samples:
        plain, jpeg = pil_to_tensor(data.loader(path)), bytearray(Path(path).read_bytes())
        box = transforms.RandomResizedCrop.get_params(plain, [0.2, 1.0], [0.75, 4 / 3])
        top, left, height, width = box
        cut = plain[:, top : top + height, left : left + width]
        same = torch.equal(decoder(jpeg), plain) and torch.equal(decoder(jpeg, lambda *_, box=box: tuple(box)), cut)
        count += not same
    return count


def prepare_speed(batch: int) -> float:
    """Images a second through flip and normalisation, on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare = Prepare(mean=MEAN, std=STD).to(device)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
    flip = torch.rand(batch, device=device) < 0.5
    times = []
    for _ in range(7):
        start = time.perf_counter()
        prepare(images, flip)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times[2:])


def measure(makers: dict[str, Callable[[], Iterator[int]]], workers: int, rounds: int, warm_up: int) -> Speeds:
    """The speed of each in each round, taken in turn."""
    speeds: Speeds = {name: [] for name in makers}
    for round_ in range(warm_up + rounds):
        for name, make in makers.items():
            value = speed(make(), workers)
            if round_ >= warm_up:
                speeds[name].append(value)
    return speeds


def report(speeds: Speeds) -> list[dict[str, object]]:
    """The table, printed, and its rows."""
    medians = {name: statistics.median(v for v, _ in values) for name, values in speeds.items()}
    busy = {name: statistics.median(b for _, b in values) for name, values in speeds.items()}
    print(f"{'':34}{'images/s: median':>18}{'max':>9}{'ratio':>8}{'goal':>6}{'CPU ms/image':>15}{'ratio':>8}")
    rows = []
    for number, name in enumerate(speeds):
        ratio, row = medians[name] / medians["peer"], number + 5
        goal = f"{GOALS[row]:g}" if row in GOALS else ""
        top, saved = max(v for v, _ in speeds[name]), busy["peer"] / busy[name]
        print(f"{name:34}{medians[name]:18.0f}{top:9.0f}{ratio:8.2f}{goal:>6}{busy[name]:15.2f}{saved:8.2f}")
        if row in GOALS:
            entry = {"row": row, "name": name, "ours": medians[name], "peer": medians["peer"], "ratio": ratio}
            rows.append(entry | {"goal": GOALS[row], "commit": revision(), "machine": machine()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="photos, at any depth")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=768, help="images a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(2)
    listing, _ = scan(options.folder, None, follow_links=True)
    files = Files(listing, Decoder(3, False, MAX_PIXELS))
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tree" / "one").mkdir(parents=True)
        for k in range(len(listing)):  # ImageFolder wants a folder of classes
            name = f"{k:07}{os.path.splitext(listing.name(k))[1]}"
            (Path(scratch) / "tree" / "one" / name).symlink_to(os.path.abspath(listing.path(k)))
        tree = Path(scratch) / "tree"
        different = unlike_pillow(tree)
        print(f"{len(files)} photos; decoded otherwise than by PIL: {different}")
        if different:
            sys.exit("The exact path is not exact here.")
        pack(files, Path(scratch) / "shards" / "train", Form(256, 90), 1024, options.workers)
        (Path(scratch) / "shards" / "val").mkdir()
        small = tar_shards(
            "train",
            store=StoreSettings(f"{scratch}/shards", False, f"{scratch}/cache", cache_gb=1.0, retry_s=1.0),
            splits="auto",
            val_fraction=0.0,
            layout=Layout(),
            lanes=8,
            window=4,
            decoder=Decoder(3, False, MAX_PIXELS),
        )
        n, b, w = options.images, options.batch, options.workers
        makers: dict[str, Callable[[], Iterator[int]]] = {
            "peer": lambda: peer(tree, n, b, w),
            "files, exact decoding": lambda: ours(files, n, b, w),
            "256-pixel shards": lambda: ours(small, 2 * n, b, w),
            "256-pixel shards, 4 crops a decode": lambda: ours(small, 4 * n, b, w, repeats=4),
        }
        rows = report(measure(makers, w, options.rounds, options.warm_up))
    print(f"flip and normalisation on the device: {prepare_speed(b):.0f} images/s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
