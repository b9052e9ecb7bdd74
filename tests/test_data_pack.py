"""Packing that goes wrong: it goes on where it stopped, loses nothing, and says why in one sentence."""

import errno

import pytest
import torch
from PIL import Image

from mae.data import pack
from mae.data.source import Arrays
from mae.data.sources import folder
from mae.errors import UserError


@pytest.fixture
def root(tmp_path):
    """train and val folders of two classes, ten images each."""
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for k in range(10):
                Image.new("RGB", (9, 9), (k, k, k)).save(tmp_path / "photos" / part / name / f"{k}.png")
    return tmp_path / "photos"


def command(root, out, *more):
    given = [str(out), "data=folder", f"data.root={root}", f"data.cache_dir={root.parent / 'cache'}"]
    return [*given, "--per-shard", "10", *(more or ("--workers", "1"))]


def fails(monkeypatch, error, where):
    """Reading files of a part raises an error; gives the undoing."""
    plain = folder.read

    def read(path, most):
        if where in path:
            raise error
        return plain(path, most)

    monkeypatch.setattr(folder, "read", read)
    return lambda: monkeypatch.setattr(folder, "read", plain)


def test_the_part_of_the_training_images_that_is_asked_for_is_packed(root, tmp_path, capsys):
    assert pack.main([*command(root, tmp_path / "out"), "data.per_class=4"]) == 0
    text = capsys.readouterr().out
    assert "train: 8 images" in text and "val: 20 images" in text


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_packing_that_stopped_in_val_goes_on_there(root, tmp_path, capsys, monkeypatch, kind):
    given = command(root, tmp_path / "out", "--workers", "1", "--format", kind)
    mended = fails(monkeypatch, OSError(errno.ESTALE, "Stale file handle"), "/val/")
    assert pack.main(given) == 1
    assert "20 of 20 images cannot be used, more than data.max_bad_fraction=0.01" in capsys.readouterr().err
    mended()
    assert pack.main([*given, "--size", "5"]) == 1  # another packing than the one that made train
    assert "train is packed already" in capsys.readouterr().err
    made = (tmp_path / "out" / "train" / "index.bin").stat().st_mtime_ns
    assert pack.main(given) == 0
    text = capsys.readouterr().out
    assert "val: 20 images in 2 shards" in text and "train" not in text
    assert (tmp_path / "out" / "train" / "index.bin").stat().st_mtime_ns == made
    assert pack.main(given) == 1
    assert capsys.readouterr().err.endswith(
        "train is packed already: choose another folder, or remove this one first.\n"
    )


def test_only_shards_with_bad_files_are_written_anew(root, tmp_path, capsys, monkeypatch):
    mended = fails(monkeypatch, OSError(errno.EIO, "Input/output error"), "/train/ant/3.png")
    assert pack.main(command(root, tmp_path / "out")) == 1
    assert "1 of 20 images cannot be used" in (text := capsys.readouterr().err) and "Input/output error" in text
    train = tmp_path / "out" / "train"
    (kept,) = train.glob("*.tar")
    assert [note.name for note in (train / "packing").glob("*.note")] == [f"{kept.name}.note"]
    before = kept.stat().st_mtime_ns
    mended()
    assert pack.main(command(root, tmp_path / "out")) == 0
    assert "train: 20 images in 2 shards" in capsys.readouterr().out and kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_image_that_takes_too_much_memory_is_a_bad_file(root, tmp_path, capsys, monkeypatch, workers):
    fails(monkeypatch, MemoryError(), "/train/ant/3.png")
    given = command(root, tmp_path / "out", "--workers", workers)
    assert pack.main(given) == 1
    text = capsys.readouterr().err
    assert "the first: ant/3.png (it takes more memory than there is)" in text and text.count("\n") == 1
    assert pack.main([*given, "data.max_bad_fraction=0.05"]) == 0
    assert "1 bad files left out" in capsys.readouterr().out
    assert "ant/3.png" in (tmp_path / "out" / "train" / "bad_files.csv").read_text()


def test_memory_that_a_shard_takes_is_one_sentence(root, tmp_path, capsys, monkeypatch):
    def full(*given):
        raise MemoryError

    monkeypatch.setattr(pack, "write_file", full)
    assert pack.main(command(root, tmp_path / "out")) == 1
    said = "shard-000000.tar cannot be written: it takes more memory than there is.\n"
    assert capsys.readouterr().err.endswith(said)


def test_an_index_that_says_nothing_is_not_taken_for_this_packing(root, tmp_path, capsys):
    for text in ("", "[]\n", '{"plan": "other"}\n'):
        out = tmp_path / "out" / "train"
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.bin").write_text(text)
        assert pack.main(command(root, tmp_path / "out")) == 1
        assert capsys.readouterr().err == f"{out} is packed already: choose another folder, or remove this one first.\n"


def test_images_whose_targets_are_maps_are_not_packed_without_them(tmp_path):
    class Mapped(Arrays):
        def __getitem__(self, index):
            image = super().__getitem__(index)[0]
            return image, image[0]

    source = Mapped(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), None, [], "mapped")
    with pytest.raises(UserError, match=r"shard-000000.tar cannot be written: .* the targets of these images are no"):
        pack.pack(source, tmp_path / "out", pack.Form(size=None, quality=90), per_shard=3, workers=1)
