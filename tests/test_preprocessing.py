"""How images were prepared for a file's weights is read on the way in, and written on the way out."""

import json
import logging
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY, TINY_PRETRAIN, composed, run_here
from PIL import Image
from torch import nn

from mae.data.prepare import Prepare
from mae.data.sources.named import named_files
from mae.data.transforms import CenterCrop
from mae.models.vit import classifier
from mae.tasks.init_weights import image_top, warn_of_crop, warn_of_statistics
from mae.weights import files as weight_files
from mae.weights.export import export
from mae.weights.export_card import Facts
from mae.weights.metadata import Metadata
from mae.weights.preprocessing import preprocessing_of
from mae.weights.read import read_pretrained

SIZES: dict[str, Any] = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4.0)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def vit(**changes) -> nn.Module:
    extra: dict[str, Any] = dict(num_classes=5, drop_path=0.0, global_pool="token")
    return classifier(**(SIZES | extra | changes)).eval()


def folder(path, files: dict) -> str:
    """A folder of weights with files of JSON beside them."""
    path.mkdir()
    safetensors.torch.save_file(vit().state_dict(), path / "model.safetensors")
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return str(path)


# ---------------------------------------------------------------- on the way in


@pytest.mark.parametrize(
    ("config", "args", "processor", "mean", "rescale"),
    [
        ({"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}, {}, {}, [0.5], None),
        ({"architecture": "x", "mean": [0.1] * 3, "std": [0.5] * 3}, {}, {}, [0.1] * 3, None),
        ({}, {}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, [0.5] * 3, 1 / 255),
        ({}, {}, {"image_mean": 0.5, "image_std": 0.5}, [0.5], 1 / 255),
        ({}, {}, {"image_processor_type": "ViTImageProcessor"}, [0.5] * 3, 1 / 255),
        ({}, {}, {"image_mean": [99.0], "image_std": [9.0], "do_rescale": False}, [99.0], 1.0),
        ({}, {}, {"image_mean": [0.5], "image_std": [0.5], "do_normalize": False}, [0.0], 1 / 255),
        ({}, {"imagenet_default_mean_and_std": False}, {}, [0.5] * 3, 1 / 255),
        ({}, {"imagenet_default_mean_and_std": True}, {}, IMAGENET["mean"], 1 / 255),
        ({}, {"mean": [0.2], "std": [0.3]}, {}, [0.2], None),
        ({"data": {"mean": [0.3], "std": [0.3]}}, {"mean": [0.2], "std": [0.3]}, {}, [0.3], None),
    ],
)
def test_what_files_say_of_the_images(config, args, processor, mean, rescale):
    preprocessing = preprocessing_of(Metadata(config, args, processor))
    assert preprocessing is not None and preprocessing.mean == mean and preprocessing.rescale == rescale


@pytest.mark.parametrize("files", [({}, {}, {}), ({}, {"mean": None, "std": None}, {}), ({}, {}, {"do_resize": True})])
def test_files_that_say_nothing_of_the_images(files):
    assert preprocessing_of(Metadata(*files)) is None


@pytest.mark.parametrize(
    ("rescale", "top", "mean"),
    [(1 / 255, 255, 0.5), (1 / 255, 65535, 0.5), (0.0039215686, 255, 0.5), (1.0, 255, 0.5 / 255), (1.0, 1.0, 0.5),
     (2 / 255, 255, 0.25), (1 / 255, 1.0, 127.5), (None, 255, 0.5), (1.0, None, 0.5)],
)  # fmt: skip
def test_statistics_are_brought_to_the_units_of_the_run(rescale, top, mean):
    processor = {"image_mean": [0.5], "image_std": [0.5], "rescale_factor": rescale}
    run: dict[str, object] = {"data": {"mean": [0.5], "std": [0.5]}}
    preprocessing = preprocessing_of(Metadata(processor=processor) if rescale else Metadata(run))
    assert preprocessing is not None
    assert preprocessing.of_images_up_to(top)["mean"] == pytest.approx([mean])


def warnings_of(caplog, path: str, *overrides: str) -> str:
    cfg = composed("task=evaluate", "data=imagenet", "data.root=.", f"init={path}", *overrides)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_statistics(cfg, read_pretrained(path))
        warn_of_crop(cfg, read_pretrained(path))
    return caplog.text


def test_hugging_faces_preprocessor_is_compared(tmp_path, caplog):
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": 2}
    path = folder(tmp_path / "net", {"preprocessor_config.json": halves})
    text = warnings_of(caplog, path)
    assert "was trained on images of data.mean=[0.5,0.5,0.5]" in text and "set data.std=[0.5,0.5,0.5]" in text
    assert "resized by bilinear interpolation" in text
    assert "trained on" not in warnings_of(caplog, path, "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]")
    bytes_ = {"image_mean": [127.5] * 3, "image_std": [127.5] * 3, "do_rescale": False}
    text = warnings_of(caplog, folder(tmp_path / "bytes", {"preprocessor_config.json": bytes_}))
    assert "set data.mean=[0.5,0.5,0.5]" in text
    nested = {"image_processor": halves}
    assert "set data.mean=[0.5,0.5,0.5]" in warnings_of(
        caplog, folder(tmp_path / "new", {"processor_config.json": nested})
    )


def test_timms_pretrained_cfg_is_compared(tmp_path, caplog, monkeypatch):
    stated_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
    path = folder(tmp_path / "net", {"config.json": {"pretrained_cfg": stated_cfg}})
    text = warnings_of(caplog, path)
    assert "set data.mean=[0.5,0.5,0.5]" in text and "set data.crop_fraction=0.9 " in text
    given = ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.crop_fraction=0.9"]
    assert not warnings_of(caplog, path, *given)
    net: dict[str, Any] = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    model = timm.create_model("vit_tiny_patch16_224", **net)
    monkeypatch.setattr(weight_files.timm, "create_model", lambda name, pretrained: model)
    text = warnings_of(caplog, "timm:vit_tiny_patch16_224")
    assert "init=timm:vit_tiny_patch16_224 was trained on images of data.mean=[0.5,0.5,0.5]" in text


@pytest.mark.parametrize("task", ["pretrain", "finetune", "linprobe", "knn", "export"])
def test_every_task_that_reads_a_file_says_it(tmp_path, task):
    files = {"preprocessor_config.json": {"image_mean": [0.25], "image_std": [0.75]}}
    path = tmp_path / "net"
    path.mkdir()
    small: dict[str, Any] = dict(patch_size=4, embed_dim=32, num_heads=2, num_classes=10)
    safetensors.torch.save_file(vit(**small).state_dict(), path / "model.safetensors")
    (path / "preprocessor_config.json").write_text(json.dumps(files["preprocessor_config.json"]))
    more = [] if task in ("knn", "export") else ["task.batch_size=32", "task.max_steps=1"]
    more += ["task.k=[1]"] if task == "knn" else []
    more += [] if task in ("knn", "export") else ["task.warmup_epochs=0"]
    small_run = [key for key in TINY if not key.startswith("model.decoder") or task == "pretrain"]
    small_run = [key for key in small_run if "precision" not in key or task != "export"]
    assert run_here(tmp_path / "run", *small_run, f"task={task}", f"init={path}", "model.patch_size=4", *more) == 0
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "was trained on images of data.mean=[0.25]" in text and "set data.std=[0.75]" in text


# ---------------------------------------------------------------- on the way out


def facts(top: float | None, chans: int = 3, crop: float = 0.875) -> Facts:
    return Facts("vit", "a test", [0.5] * chans, [0.25] * chans, top=top, crop=crop)


@pytest.mark.parametrize(("top", "crop"), [(255.0, 0.875), (1.0, 0.875), (1.0, 1.0)])
@pytest.mark.parametrize("shape", [(20, 27, 3), (36, 18, 3), (18, 18, 3)])
def test_hugging_faces_processor_prepares_as_evaluate(tmp_path, top, crop, shape):
    """Where what is cut off is even: an odd rest they cut a pixel further left, and no setting of theirs changes it."""
    transformers = pytest.importorskip("transformers")
    export(vit(), format="huggingface", path=str(tmp_path), facts=facts(top, crop=crop))
    values = (np.random.default_rng(0).random(shape) * (255 if top == 255 else 7)).astype(
        np.uint8 if top == 255 else np.float32
    )
    prepared = transformers.AutoImageProcessor.from_pretrained(tmp_path)(values, return_tensors="pt")["pixel_values"]
    image = CenterCrop(img_size=16, crop_fraction=crop)(torch.from_numpy(values).permute(2, 0, 1).contiguous())
    ours = Prepare(mean=[0.5] * 3, std=[0.25] * 3)(image[None])
    torch.testing.assert_close(prepared, ours, atol=1.01 / 255 / 0.25 if top == 255 else 1e-4, rtol=0)
    preprocessing = read_pretrained(str(tmp_path)).preprocessing
    assert preprocessing is not None and preprocessing.of_images_up_to(top)["mean"] == [0.5] * 3


def test_images_that_hugging_face_cannot_prepare_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot prepare 16-bit images.*task\.format=timm, reference or safetensors"):
        export(vit(), format="huggingface", path=str(tmp_path / "a"), facts=facts(65535.0))
    with pytest.raises(ValueError, match=r"needs to know the type of the images.*\(data\.root=DIR\)"):
        export(vit(), format="huggingface", path=str(tmp_path / "b"), facts=facts(None))
    assert not list(tmp_path.iterdir())


def test_the_type_of_images_that_are_gone_is_not_known(tmp_path):
    """So that a plain export needs no data."""
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "0.npy", np.zeros((5, 20, 20), np.uint16))
    data = ["data=scientific", f"data.root={tmp_path / 'data'}", f"data.cache_dir={tmp_path}", "data.val_fraction=1"]
    cfg = composed("task=export", "init=x", *data)
    assert image_top(cfg) == 65535
    (tmp_path / "data" / "0.npy").unlink()
    assert image_top(cfg) is None
    (tmp_path / "data").rmdir()
    assert image_top(cfg) is None


def test_bands_with_maps_are_as_deep_as_their_files(tmp_path):
    for folder, values in (("images", np.full((5, 20, 20), 4000, np.uint16)), ("masks", np.zeros((20, 20), np.uint8))):
        for split in ("train", "val"):
            (tmp_path / folder / split).mkdir(parents=True)
            if folder == "images":
                np.save(tmp_path / folder / split / "0.npy", values)
            else:
                Image.fromarray(values).save(tmp_path / folder / split / "0.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    cfg = composed("task=export", "init=x", "data=segmentation_bands", f"data.root={tmp_path}")
    assert image_top(cfg) == 65535
    image = named_files([str(tmp_path / "images" / "val" / "0.npy")], cfg.data)[0][0]
    assert image.dtype == torch.uint16 and image.shape[0] == 5


def test_no_processor_is_written_that_stretches_images(tmp_path, caplog):
    model = vit(img_size=[16, 24])
    with caplog.at_level(logging.WARNING):
        export(model, format="huggingface", path=str(tmp_path), facts=facts(255.0))
    assert not (tmp_path / "preprocessor_config.json").exists()
    sentence = "images must be resized to cover 18 x 27 (height x width) and the centre 16 x 24 cut out"
    assert sentence in caplog.text and sentence in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("dtype", "words"),
    [("uint8", "RGB values in [0, 1]"), ("uint16", "16 bits over 65535"), ("float32", "own floating values")],
)
def test_an_export_knows_the_type_of_the_runs_images(tmp_path, dtype, words):
    pytest.importorskip("tifffile")
    (tmp_path / "data").mkdir()
    for number in range(40):
        values = np.random.default_rng(number).random((3, 20, 20)) * (1 if dtype == "float32" else 200)
        np.save(tmp_path / "data" / f"{number}.npy", values.astype(dtype))
    (tmp_path / "data" / "0.npy").write_bytes(b"damaged")
    data = ["data=scientific", f"data.root={tmp_path / 'data'}", "data.in_chans=3", f"data.cache_dir={tmp_path}"]
    tiny = [key for key in TINY_PRETRAIN if key not in ("data.fraction=0.1", "task.epochs=2", "task.batch_size=32")]
    tiny += ["task.batch_size=16", "task.max_steps=2", "data.num_workers=0", "model.patch_size=4"]
    tiny += ["data.max_bad_fraction=0.2"]
    assert run_here(tmp_path / "run", *tiny, *data) == 0
    command = ["task=export", "device=cpu", f"init={tmp_path / 'run'}", *data]
    command += [key for key in tiny if key.startswith(("model.", "data."))]
    assert run_here(tmp_path / "plain", *command, "task.format=safetensors") == 0
    files = tmp_path / "plain" / "export" / "safetensors"
    assert words in (files / "README.md").read_text()
    top = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    assert read_pretrained(str(files)).meta.args["rescale_factor"] == 1 / top
    if dtype == "uint16":
        with pytest.raises(ValueError, match="cannot prepare 16-bit images"):
            run_here(tmp_path / "hf", *command, "task.format=huggingface")
    else:
        assert run_here(tmp_path / "hf", *command, "task.format=huggingface") == 0
        processor = tmp_path / "hf" / "export" / "huggingface" / "preprocessor_config.json"
        assert json.loads(processor.read_text())["rescale_factor"] == 1 / top
