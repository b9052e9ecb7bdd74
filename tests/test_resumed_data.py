"""A run that goes on where its data have changed: other classes are refused, other images are said."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, composed, make_source, run_here
from PIL import Image

from mae import checkpoint, device, engine
from mae.data import pack
from mae.data.source import Arrays, fingerprint
from mae.data.sources.folder import image_folder
from mae.data.subsets import Subset
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.runs.checkpoints import MANIFEST, newest_valid
from mae.tasks.embed import Parts
from mae.tracking.base import Tracker
from mae.training import set_up

MODEL = [override for override in TINY if not override.startswith("data.")]
TRAINED = ["task.warmup_epochs=0", "task.batch_size=8", "task.epochs=2"]
FINETUNE = ["task=finetune", "task.mixup=0", "task.cutmix=0", *TRAINED]


def photos(root: Path, *classes: str, bright: int = 0) -> Path:
    """Eight images of each class, which differ in all but their names from those of another brightness."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(8):
            pixels = np.full((16, 16, 3), 100 + 10 * label + k + bright, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


def data(root: Path) -> list[str]:
    return ["data=folder", f"data.root={root}", f"data.cache_dir={root.parent}", "data.img_size=16"]


def begun(run: Path, root: Path | None, *task: str) -> engine.Training:
    """A run as it is before its next step."""
    run.mkdir(exist_ok=True)
    cfg = composed(*MODEL, *([] if root is None else data(root)), *task, "data.num_workers=0")
    return engine.call(set_up, cfg.task, run, cfg, Ranks(device.pick(cfg.device)), Tracker())


def saved(run: Path, root: Path | None, *task: str) -> None:
    """A run with a checkpoint of its first step."""
    t = begun(run, root, *task)
    t.progress.step += 1
    t.save()
    t.saver.wait()
    t.loader.close()


def write_as_before(run: Path, classes: list[str] | None) -> None:
    """Makes a checkpoint what earlier versions wrote: without names of classes and images."""
    path = newest_valid(run)
    assert path is not None
    trainer, weights = checkpoint.read_trainer(path), checkpoint.read_weights(path)
    trainer["images"] = trainer["images"].rpartition(", ")[0]
    shutil.rmtree(path)
    checkpoint.write(path, weights, trainer, {"step": 1, "epoch": 0.5})
    assert "classes" not in json.loads((path / MANIFEST).read_text())
    if classes is not None:
        (run / "classes.json").write_text(json.dumps(classes))


OTHERS = {
    ("dog", "eel", "zebra"): "cat is missing, zebra is new",
    ("ant", "bee", "zebra"): "cat, dog and eel are missing, ant, bee and zebra are new",
    ("cat", "dog", "eel", "fox"): "fox is new",
    ("dog", "eel"): "cat is missing",
}


@pytest.mark.parametrize("version", ["today's", "earlier"])
def test_other_classes_are_refused_before_anything_is_loaded_or_written(tmp_path, version):
    run, learnt = tmp_path / "run", ["cat", "dog", "eel"]
    saved(run, photos(tmp_path / "first", *learnt), *FINETUNE)
    if version == "earlier":
        write_as_before(run, learnt)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for number, (classes, differences) in enumerate(OTHERS.items()):
        other = photos(tmp_path / f"other{number}", *classes)
        with pytest.raises(UserError) as caught:
            begun(run, other, *FINETUNE)
        assert str(caught.value) == (
            f"{run} has learnt 3 classes, and data.root={other} has others: {differences}. Correct data.root, or start "
            "a new run for these classes with another output_dir."
        )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_classes_in_another_order_are_refused(tmp_path):
    def scenes(names: str) -> list[str]:
        (tmp_path / "classes.txt").write_text(names)
        return ["task=segment", "data=segmentation_folder", f"data.root={tmp_path}", "data.img_size=16", *TRAINED]

    for part in ("train", "val"):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / kind / part).mkdir(parents=True)
            for k in range(8):
                Image.new(mode, (16, 16)).save(tmp_path / kind / part / f"{k}.png")
    saved(tmp_path / "run", None, *scenes("sky\nsea\n"))
    with pytest.raises(UserError, match=r"has learnt 2 classes, and .* has others: the same names in another order\."):
        begun(tmp_path / "run", None, *scenes("sea\nsky\n"))


def test_the_classes_of_an_online_probe_are_refused_too(tmp_path):
    task = ["task=pretrain", "task.online_probe=true", *TRAINED]
    saved(tmp_path / "run", photos(tmp_path / "first", "cat", "dog"), *task)
    with pytest.raises(UserError, match="fox is new"):
        begun(tmp_path / "run", photos(tmp_path / "second", "cat", "dog", "fox"), *task)


def test_other_images_of_the_same_number_are_said_and_moved_ones_are_not(tmp_path, caplog):
    task, text = ["task=pretrain", *TRAINED], "the training images are not those that the run began with"
    first = photos(tmp_path / "first", "cat", "dog")
    saved(tmp_path / "run", first, *task)
    begun(tmp_path / "run", shutil.copytree(first, tmp_path / "moved"), *task).loader.close()
    assert text not in caplog.text
    (tmp_path / "moved" / "cat" / "0.png").rename(tmp_path / "moved" / "cat" / "00.png")
    begun(tmp_path / "run", tmp_path / "moved", *task).loader.close()
    assert caplog.text.count(text) == 1
    write_as_before(tmp_path / "run", None)  # which knew count and labels alone
    begun(tmp_path / "run", tmp_path / "moved", *task).loader.close()
    assert caplog.text.count(text) == 1


def test_a_fingerprint_is_that_of_the_chosen_images(tmp_path):
    options = {"in_chans": 3, "exif_orientation": False, "max_pixels": 10**7, "follow_links": False}
    options |= {"cache_dir": str(tmp_path), "splits": "auto", "val_fraction": 0.25}
    root = photos(tmp_path / "photos", "cat", "dog")
    source = make_source(image_folder, "train", root=str(root), **options)
    names = [source.name(index) for index in range(len(source))]
    assert isinstance(source, Subset) and source.root == str(root.resolve())
    others = np.flatnonzero(~np.isin(np.arange(16), source.indices))
    (root / source.source.name(int(others[0]))).unlink()  # held out: another listing, the same training images
    (root / "cat" / "9.png").write_bytes(b"")
    fewer = make_source(image_folder, "train", root=str(root), **options)
    whole = fewer.source if isinstance(fewer, Subset) else fewer
    chosen = Subset(whole, np.array([k for k in range(len(whole)) if whole.name(k) in names]))
    assert fingerprint(chosen) == fingerprint(source) != fingerprint(fewer)


def test_the_same_labels_under_other_names_are_other_images():
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), np.array([0, 1, 0, 1])
    first, second, third = (
        fingerprint(Arrays(images, labels, classes, name))
        for classes, name in ((["a", "b"], "x"), (["b", "a"], "x"), (["a", "b"], "y"))
    )
    assert first.rpartition(", ")[0] == second.rpartition(", ")[0] == third.rpartition(", ")[0]
    assert len({first, second, third}) == 3


# ---------------------------------------------------------------- features and shards that were begun


def dying(write, after: int):
    """`write`, which fails when it was called so often."""
    calls: list[float] = []

    def called(*arguments):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(time.time())
        return write(*arguments)

    return called


def test_features_of_another_folder_are_not_mixed_with_those_of_the_first(tmp_path, monkeypatch):
    first, second = photos(tmp_path / "first", "cat"), photos(tmp_path / "second", "cat", bright=90)
    init = tmp_path / "weights.pth"
    torch.save(begun(tmp_path / "pre", first, "task=pretrain", *TRAINED).task.model.state_dict(), init)
    task = ["task=embed", *MODEL, f"init={init}", "task.batch_size=2", "task.part_batches=1", "data.num_workers=0"]
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", dying(Parts.write, 2))
        with pytest.raises(KeyboardInterrupt):
            run_here(tmp_path / "mixed", *task, *data(first))
    assert len(list((tmp_path / "mixed" / "parts").glob("*.npz"))) == 2
    assert run_here(tmp_path / "mixed", *task, *data(second)) == 0
    assert run_here(tmp_path / "whole", *task, *data(second)) == 0
    mixed, whole = (np.load(tmp_path / name / "features.npy") for name in ("mixed", "whole"))
    assert (mixed == whole).all()


def test_images_of_another_folder_are_not_packed_among_those_of_the_first(tmp_path, monkeypatch, capsys):
    first, second = photos(tmp_path / "first", "cat", "dog"), photos(tmp_path / "second", "cat", "dog", bright=90)
    out = tmp_path / "out"

    def command(root: Path) -> list[str]:
        return [str(out), *data(root)[:3], "data.val_fraction=0.25", "--per-shard", "5", "--workers", "1"]

    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_file", dying(pack.write_file, 2))
        with pytest.raises(KeyboardInterrupt):
            pack.main(command(first))
    assert pack.main(command(second)) == 1
    assert capsys.readouterr().err == (
        f"{out / 'train'} was begun with another source or other options (root): choose another folder.\n"
    )
    plan = out / "train" / "packing" / "plan.json"  # as earlier versions wrote it
    plan.write_text(json.dumps({k: v for k, v in json.loads(plan.read_text()).items() if k not in ("root", "names")}))
    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_file", dying(pack.write_file, 1))  # train is complete, val is not
        with pytest.raises(KeyboardInterrupt):
            pack.main(command(first))
    assert (out / "train" / "index.bin").exists() and pack.main(command(first)) == 0
