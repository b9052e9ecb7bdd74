"""A listing of two million paths: how soon it is there, and that no worker's memory grows with it."""

import io
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_loader, make_source, of_type
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mae.data import transforms
from mae.data.sources import folder, listing
from mae.data.sources.folder import image_folder

PATHS, FOLDERS = 2_000_000, 1000
OPTIONS = {"in_chans": 3, "val_fraction": 0.1, "exif_orientation": False, "max_pixels": 10**7, "follow_links": False}
OPTIONS |= {"splits": "auto"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Folders of classes that are there, and in the cache a listing of images that are not; all read alike."""
    classes, made = [f"n{k:08}" for k in range(FOLDERS)], listing.Builder()
    for label, name in enumerate(classes):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(PATHS // FOLDERS):
            made.add(f"{name}/{name}_{k}.JPEG", label)
    top, cache = tmp_path / "set", tmp_path / "cache"
    known = {}

    def keep(path, root, wanted):
        known.update(path=path, wanted=wanted)

    with monkeypatch.context() as patch:  # to learn under which name it is looked for
        patch.setattr(listing, "load", keep)
        listing.cached_scan(top, classes, False, str(cache))
    stamps = {name: (top / name).stat().st_mtime_ns for name in ["", *classes]}
    listing.save(known["path"], made.listing(str(top), classes), stamps, known["wanted"])
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(out, "JPEG")
    monkeypatch.setattr(folder, "read", lambda path, most=None: bytearray(out.getvalue()))
    return top


def loader(root, **changes):
    source = make_source(image_folder, "train", root=str(root), cache_dir=str(root.parent / "cache"), **OPTIONS)
    transform = transforms.CenterCrop(img_size=8, crop_fraction=1.0)
    options = {"workers": "process", "prefetch": 2, "timeout_s": 60.0, "repeats": 1, "fraction": 1.0, "per_class": None}
    return make_loader(source, transform, 1800, 1800, 0, max_bad_fraction=0.0, **(options | changes))


def resident(pid: int) -> float:
    """MB of a process's memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_two_million_paths(root):
    busy = time.process_time()  # of this process alone, for other programs run beside the tests
    first = loader(root, num_workers=0)
    batch = next(iter(next(first.steps(0))))
    busy = time.process_time() - busy
    assert len(first.source) == 1_800_000 and len(batch["index"]) == 1800
    assert busy < 2.0, busy

    many = loader(root, num_workers=2)
    processes = of_type(DataLoader, many._loader)
    workers, before, images = [], [], 0
    for number, step in enumerate(itertools.islice(many.steps(0), 400)):
        for batch in step:
            images += len(batch["index"])
        if number == 20:  # buffers have their size
            workers = [process.pid for process in of_type(_MultiProcessingDataLoaderIter, processes._iterator)._workers]
            before = [resident(pid) for pid in workers]
    grown = [resident(pid) - start for pid, start in zip(workers, before, strict=True)]
    many.close()
    assert images == 720_000 and len(grown) == 2
    assert max(grown) < 5.0, grown


def test_names_of_a_listing_are_not_objects():
    made = listing.Builder()
    for k in range(1000):
        made.add(f"a/{k}.jpg", 0)
    found = made.listing("/x", ["a"])
    assert found.path(999) == "/x/a/999.jpg" and isinstance(found.text, np.ndarray) and len(found) == 1000
