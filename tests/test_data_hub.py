"""Hugging Face datasets, read from folders."""

import numpy as np
import pytest
import torch

from mae.data.hub import hf

datasets = pytest.importorskip("datasets")

PICTURES = [np.full((9, 12, 3), 10 * k, np.uint8) for k in range(10)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Ten images of two classes: as saved by datasets, and as Parquet."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("hub")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "kind": datasets.Value("string"),
        }
    )
    rows = {"image": [Image.fromarray(p) for p in PICTURES], "label": [k % 2 for k in range(10)]}
    rows["kind"] = [("zoo", "bar", "bar")[k % 3] for k in range(10)]
    whole = datasets.Dataset.from_dict(rows, features=features)
    parts = datasets.DatasetDict({"train": whole, "test": whole.select([1, 3])})
    parts.save_to_disk(str(folder / "arrow"))
    whole.save_to_disk(str(folder / "one"))
    (folder / "parquet").mkdir()
    for name, part in parts.items():
        part.to_parquet(str(folder / "parquet" / f"{name}-00000-of-00001.parquet"))
    return folder


def opened(root, split="train", **changes):
    options = {"subset": None, "image_column": "image", "label_column": "label", "train_split": "train"}
    options |= {"val_split": "test", "in_chans": 3, "val_fraction": 0.2, "exif_orientation": False}
    options |= {"max_pixels": 10**6, "cache_dir": str(root.parent / "cache")}
    return hf(split, root=str(root), **(options | changes))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_rows(made, kind):
    train, val = opened(made / kind), opened(made / kind, "val")
    assert len(train) == 10 and len(val) == 2 and train.classes == ["cat", "dog"]
    for k in range(10):
        image, label = train[k]
        assert torch.equal(image, torch.from_numpy(PICTURES[k]).permute(2, 0, 1)) and label == k % 2
    assert val.labels.tolist() == [1, 1]
    words = opened(made / kind, label_column="kind")
    assert words.classes == ["bar", "zoo"] and words.labels[:3].tolist() == [1, 0, 0]
    assert opened(made / kind, label_column=None)[0][1] == -1


def test_a_part_is_held_out_where_there_is_no_second_split(made):
    parts = [opened(made / "one", s, val_split=None) for s in ("train", "val")]
    assert [len(p) for p in parts] == [8, 2] and sorted(parts[1].labels) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_column": "img"}, "data.image_column=img is not one of its columns: image, label, kind"),
        ({"label_column": "fine"}, "data.label_column=fine is not one of its columns"),
        ({"train_split": "training"}, "data.root=.*cannot be opened as a data set, split training"),
    ],
)
def test_faults_are_named(made, changes, says):
    for kind in ("arrow", "parquet"):
        with pytest.raises(ValueError, match=says):
            opened(made / kind, **changes)
    with pytest.raises(ValueError, match="cannot be opened .*there is no such folder"):
        opened(made / "nowhere")
