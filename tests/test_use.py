"""A run or a file as a model: `mae.load`, torch.hub, task=embed, task=predict, and docs/use.md as it stands."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY_PRETRAIN, of_type, run_here
from PIL import Image
from test_tasks import TINY_FINETUNE, TINY_OTHER
from timm.models.vision_transformer import VisionTransformer

import mae
from mae.errors import UserError
from mae.models.layers import blocks_of
from mae.runs.checkpoints import newest_valid
from mae.tasks.inference import ImageModel

CLASSES = ["ant", "bee", "cat"]


def photo(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 28)) -> Image.Image:
    """A smooth picture of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).convert(mode)


def photos(root: Path, classes: list[str], count: int) -> Path:
    """JPEGs in folders of classes, every third of another kind: grey, CMYK, PNG with alpha, turned by EXIF."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(count):
            path, seed = root / name / f"{k:03d}.jpg", 100 * label + k
            if k % 6 == 1:
                photo(seed, "L").save(path)
            elif k % 6 == 2:
                photo(seed, "CMYK").save(path)
            elif k % 6 == 3:
                photo(seed, "RGBA").save(path.with_suffix(".png"))
            elif k % 6 == 4:
                image = photo(seed)
                exif = image.getexif()
                exif[0x0112] = 6
                image.save(path, exif=exif)
            else:
                photo(seed, size=(28, 40 + k)).save(path)
    return root


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """Photos of three classes, six of each."""
    return photos(tmp_path_factory.mktemp("photos"), CLASSES, 6)


@pytest.fixture(scope="session")
def autoencoder_run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("pretrained")
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=2") == 0
    return run


@pytest.fixture(scope="session")
def classifier_run(tree, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("classifier")
    data = ["data=folder", f"data.root={tree}", "data.val_fraction=0.5", "data.fraction=1", "data.crop_fraction=0.8"]
    exact = ["data.exif_orientation=true", "task.batch_size=4", "task.mixup=0", "task.cutmix=0"]
    assert run_here(run, *TINY_FINETUNE, *data, *exact, "optimizer.base_lr=0.5") == 0
    return run


@pytest.fixture(scope="session")
def classifier(classifier_run) -> ImageModel:
    return mae.load(classifier_run)


def test_a_classifier_loads_with_its_classes_and_the_probabilities_of_its_evaluation(
    classifier, classifier_run, tree, tmp_path
):
    assert classifier.classes == CLASSES and not classifier.training
    command = [f"init={classifier_run}", "data=folder", f"data.root={tree}", "data.exif_orientation=true"]
    command += ["data.crop_fraction=0.8", "task.precision=fp32", "data.val_fraction=1", "data.img_size=16"]
    small = [override for override in TINY_OTHER if not override.startswith("data.")]
    assert run_here(tmp_path, "task=evaluate", *small, *command) == 0
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 18
    predicted = classifier.predict([tree / row["file"] for row in rows], k=1)
    assert [names[0] for names in predicted.classes] == [row["predicted"] for row in rows]
    confidences = [float(row["confidence"]) for row in rows]
    assert predicted.probabilities[:, 0].tolist() == pytest.approx(confidences, abs=1e-5)
    assert len(set(confidences)) > 6  # images do differ


def test_a_picture_is_prepared_alike_as_file_and_as_pillow_s_image(classifier, tree):
    files = sorted(tree.rglob("*.*"))
    for file in files:
        from_file = classifier.preprocess(file)
        assert from_file.shape == (3, 16, 16) and from_file.dtype == torch.float32
        with Image.open(file) as image:
            torch.testing.assert_close(classifier.preprocess(image), from_file, atol=0, rtol=0)
    turned = photo(4)  # of class ant: its EXIF says 6, a quarter turn clockwise
    expected = classifier.preprocess(turned.transpose(Image.Transpose.ROTATE_270))
    assert (classifier.preprocess(tree / "ant" / "004.jpg") - expected).abs().mean() < 0.2  # what JPEG changes


def test_features_are_what_timm_computes_at_every_layer_and_pooling(classifier, tree):
    images = torch.stack([classifier.preprocess(file) for file in sorted(tree.rglob("*.jpg"))[:3]])
    network = of_type(VisionTransformer, classifier.network)
    with torch.no_grad():
        tokens = network.forward_features(images)
        torch.testing.assert_close(classifier.embed(images), network.forward_head(tokens, pre_logits=True))
        hidden = of_type(torch.Tensor, network._pos_embed(network.patch_embed(images)))
        for layer, block in enumerate(blocks_of(network)):
            hidden = block(hidden)
            for number in (layer, layer - 2):
                torch.testing.assert_close(classifier.embed(images, "patches", number), hidden[:, 1:])
                torch.testing.assert_close(classifier.embed(images, "token", number), hidden[:, 0])
                torch.testing.assert_close(classifier.embed(images, "avg", number), hidden[:, 1:].mean(1))
    assert classifier.embed(images, pooling="patches").shape == (3, 16, 32)
    torch.testing.assert_close(classifier.embed(images[0]), classifier.embed(images)[:1])
    with pytest.raises(UserError, match=r"^layer 2 is none of the 2 blocks: choose -2 to 1, or null\.$"):
        classifier.embed(images, layer=2)


def test_an_autoencoder_has_features_after_its_last_norm_and_no_labels(autoencoder_run):
    checkpoint = newest_valid(autoencoder_run)
    assert checkpoint is not None
    model = mae.load(str(checkpoint))
    images = torch.rand(2, 3, 16, 16)
    whole = timm.create_model(
        "vit_base_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    state = model.network.state_dict()
    whole.load_state_dict(state)
    with torch.no_grad():
        tokens = of_type(VisionTransformer, whole).eval().forward_features(images)
    torch.testing.assert_close(model.embed(images, pooling="token"), tokens[:, 0])
    torch.testing.assert_close(model.embed(images), tokens[:, 1:].mean(1))
    assert model.classes == [] and model.embed(photo(0)).shape == (1, 32)
    with pytest.raises(UserError) as caught:
        model.predict(images)
    assert "(ours, pretrained (encoder and decoder)) predicts no labels: it has no classes. Fine-tune it" in str(
        caught.value
    )


@pytest.mark.parametrize("file_format", ["timm", "safetensors"])
def test_an_exported_file_loads_without_its_run(classifier, classifier_run, tree, tmp_path, file_format):
    small = [override for override in TINY_OTHER if not override.startswith("data.")]
    data = ["data=folder", f"data.root={tree}", "data.img_size=16", "data.crop_fraction=0.8"]
    target = [f"task.format={file_format}", f"task.path={tmp_path / 'file'}"]
    command = ["task=export", f"init={classifier_run}", *small, *data, *target]
    assert run_here(tmp_path / "run", *command) == 0
    model = mae.load(tmp_path / "file", exif_orientation=True)
    images = sorted(tree.rglob("*.jpg"))[:4]
    assert model.classes == CLASSES
    torch.testing.assert_close(model.predict(images).probabilities, classifier.predict(images).probabilities)
    torch.testing.assert_close(model.embed(images), classifier.embed(images))


def test_what_a_bare_file_does_not_say_is_asked_for(classifier, tmp_path, caplog):
    path = tmp_path / "model.pth"
    torch.save({"model": classifier.network.state_dict()}, path)
    with pytest.raises(UserError, match=r"does not say its number of heads: type mae\.load\(\.\.\., num_heads=12\)\.$"):
        mae.load(path)
    assert mae.load(path, num_heads=2, mean=[0.5] * 3, std=[0.5] * 3).classes == ["0", "1", "2"]
    assert "it is assumed" not in caplog.text
    assert mae.load(path, num_heads=2).preprocess(photo(0)).shape == (3, 16, 16)
    assert "does not say how images were normalised: by ImageNet's mean and std, it is assumed" in caplog.text
    with pytest.raises(UserError, match=r"^heads is no setting of mae\.load\. Did you mean num_heads\?$"):
        mae.load(path, heads=2)


def test_a_picture_that_cannot_be_read_is_named(classifier, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.jpg cannot be used: not an image of a known kind\.$"):
        classifier.predict(tmp_path / "bad.jpg")
    with pytest.raises(UserError, match=r"none\.jpg cannot be used: .*No such file"):
        classifier.preprocess(str(tmp_path / "none.jpg"))


def test_torch_hub_loads_a_run(classifier, classifier_run, tree):
    model = torch.hub.load(str(ROOT), "mae", str(classifier_run), source="local", verbose=False)
    file = next(iter(sorted(tree.rglob("*.jpg"))))
    assert of_type(ImageModel, model).predict(file, k=1).classes == classifier.predict(file, k=1).classes


# ---------------------------------------------------------------- docs/use.md

TEXT = (ROOT / "docs" / "use.md").read_text()


def test_the_lines_of_python_in_docs_run(autoencoder_run, classifier_run, tmp_path):
    photo(0).save(tmp_path / "photo.jpg")
    scope: dict[str, object] = {"run": autoencoder_run, "classifier_run": classifier_run, "repository": str(ROOT)}
    scope |= {"photo": tmp_path / "photo.jpg"}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/use.md", "exec"), scope)
