"""Targets: against other libraries and plain computations, and what runs with them do."""

import functools
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, TINY_PRETRAIN, composed, of_type, run_cli, run_here
from omegaconf import DictConfig, OmegaConf
from test_distributed import on_ranks, trained
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae import checkpoint, metrics
from mae.config.build import build, call
from mae.config.identity import identity
from mae.data.prepare import Prepare
from mae.errors import UserError
from mae.models import renderings, targets
from mae.models.layers import LayerNorm
from mae.models.mae import MaskedAutoencoder
from mae.models.target import Patches, Target
from mae.models.targets import OUTSIDE, TARGETS, FeatureTarget, HogTarget, PcaTarget, TokenTarget
from mae.models.teacher import Teacher
from mae.models.vit import classifier
from mae.runs.files import read_json_lines
from mae.tasks.autoencoder import build_autoencoder, restore_teacher
from mae.tools.dry_run import report
from mae.tools.planned_model import model_on_meta, operations
from mae.weights import files as weight_files
from mae.weights.files import Metadata
from mae.weights.load import load_pretrained
from mae.weights.preprocessing import IMAGENET
from mae.weights.read import PretrainedWeights, read_pretrained
from mae.weights.unstated import number_of_heads

SIZES: dict[str, Any] = dict(
    img_size=[16, 24], patch_size=8, in_chans=3, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0,
    decoder="self", mask_tokens="decoder", decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2,
    norm_pix_loss=False,
)  # fmt: skip
GRID, SIDE = (2, 3), (8, 8)
VOCABULARY = 16


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def small_teacher(name: str) -> Teacher:
    """A teacher of random weights, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = classifier(
            img_size=[16, 24], patch_size=8, in_chans=3, embed_dim=12, depth=3, num_heads=2, mlp_ratio=2.0,
            num_classes=0, drop_path=0.0, global_pool="avg",
        )  # fmt: skip
    return Teacher(12, 3, network, torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), -1.0))


class Brightness(nn.Module):
    """A tokenizer: 16 steps of a patch's brightness."""

    def forward(self, images: Tensor) -> Tensor:
        return (F.avg_pool2d(images.mean(1, keepdim=True), 8) * 15.99).long().flatten(1)


class Twice(nn.Module):
    """No tokenizer: its ids stand in a pair."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokens.pt"
    torch.jit.save(torch.jit.trace(Brightness(), rand(2, 3, 16, 24)), str(path))
    return path


def make(name: str, script: Path, patches: Patches | None = None, **settings: object) -> Target:
    """A target of small images, with the settings that its YAML has for them."""
    of = patches or Patches(GRID, SIDE, 3, name == "pixels", read_teacher=small_teacher)
    defaults: dict[str, dict[str, object]] = {
        "pca": {"components": 5, "images": None, "fitted": None},
        "hog": {"orientations": 9, "cell": 4},
        "features": {"teacher": "small", "layer": 2, "loss": "mse"},
        "tokens": {"file": str(script), "vocabulary": VOCABULARY},
    }
    target = build(TARGETS, {"name": name} | defaults.get(name, {}) | settings, of)
    if isinstance(target, PcaTarget):
        target.estimate([rows(rand(20, 3, 16, 24, seed=5))], lambda sums: sums)
    return target


def rows(images: Tensor) -> Tensor:
    """Patches (B, 6, 192) of images of 16 x 24 pixels."""
    return MaskedAutoencoder(**SIZES).patchify(images)


# ---------------------------------------------------------------- one target


def test_each_target_has_its_yaml():
    files = {path.stem: OmegaConf.load(path) for path in (ROOT / "conf" / "target").glob("*.yaml")}
    assert files.keys() == TARGETS.keys()
    assert all(of_type(DictConfig, files[name]).get("name") == name for name in TARGETS)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_batch_in_two_halves_has_the_loss_and_gradient_of_the_whole(name, script):
    torch.manual_seed(0)
    model = MaskedAutoencoder(make(name, script), **SIZES).double()
    images, noise = rand(4, 3, 16, 24).double(), rand(4, 6, seed=1)
    whole = model(images, 0.5, noise).loss
    whole.backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    halves = [model(images[part], 0.5, noise[part]).loss / 2 for part in (slice(2), slice(2, 4))]
    sum(halves, torch.zeros(())).backward()
    assert sum(half.item() for half in halves) == pytest.approx(whole.item(), rel=1e-10)
    for mine, theirs in zip([p.grad for p in model.parameters() if p.grad is not None], gradient, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(images.float(), 0.5, noise).loss.item() == pytest.approx(whole.item(), rel=0.03)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_loss_is_that_of_the_masked_patches_alone(name, script):
    torch.manual_seed(0)
    target = make(name, script)
    model = MaskedAutoencoder(target, **SIZES)
    images, noise = rand(2, 3, 16, 24), rand(2, 6, seed=1)
    loss, mask = model(images, 0.5, noise)
    pred = model.predict(images, 0.5, noise).pred
    masked = mask.bool()
    values = target(images, rows(images))
    by_hand = target.loss(pred[masked].view(2, 3, -1), values[masked].view(2, 3, *values.shape[2:]))
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_pictures_show_targets_and_predictions_apart(name, script):
    target = make(name, script)
    images = rand(2, 3, 16, 24)
    values, patches = target(images, rows(images)), rows(images)
    pred = F.one_hot(values, VOCABULARY).float() if target.gives_ids else values
    pixels = target.to_pixels(pred, patches)
    if pixels is not None:
        assert pixels.shape == patches.shape
        if name == "pixels":
            torch.testing.assert_close(pixels, patches)
        return
    drawn, predicted = target.pictures(values, pred)
    assert drawn.shape == predicted.shape and drawn.shape[:2] == (2, 3)
    torch.testing.assert_close(drawn, predicted)
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1 and float(drawn.std()) > 0.05
    other = target.pictures(values, pred.roll(1, 1))[1]
    assert not torch.equal(other, drawn)


def test_pca_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.decomposition")
    target = PcaTarget(Patches(GRID, SIDE, 3, False), components=7, images=None, fitted=None)
    patches = rows(rand(60, 3, 16, 24) * rand(1, 3, 16, 24, seed=2)).double() + 3
    target.estimate(patches.split(7), lambda sums: sums)
    theirs = sklearn.PCA(7, svd_solver="full").fit(patches.flatten(0, 1).numpy())
    np.testing.assert_allclose(target.basis.numpy(), theirs.components_, atol=1e-6)
    np.testing.assert_allclose(target.mean.numpy(), theirs.mean_, atol=1e-6)
    expected = theirs.transform(patches[0].numpy())
    np.testing.assert_allclose(target.double()(patches[:1], patches[:1])[0].numpy(), expected, atol=1e-5)
    halves = PcaTarget(Patches(GRID, SIDE, 3, False), components=7, images=None, fitted=None)  # as two ranks would
    sums: list[Tensor] = []
    for half in (patches[:31], patches[31:]):
        halves.estimate([half], lambda values: sums.append(values) or values)
    halves.estimate([], lambda values: sums[0] + sums[1])
    torch.testing.assert_close(halves.basis.double(), target.basis, atol=1e-6, rtol=0)
    whole = PcaTarget(Patches(GRID, SIDE, 3, False), components=192, images=None, fitted=None)
    whole.estimate([patches], lambda values: values)
    back = whole.double().to_pixels(whole(patches, patches), patches)
    torch.testing.assert_close(back, patches, atol=1e-5, rtol=0)


def test_float64_is_computed_on_a_device_that_has_it(monkeypatch):
    """`meta` stands for the host, and the host for a device without float64, as mps."""
    for module in (targets, renderings, metrics):
        monkeypatch.setattr(module, "exact", lambda device: torch.device("meta"))
    counter = metrics.PixelCounter(2)
    counter.add(torch.zeros(1, 4, 4, dtype=torch.uint8), rand(1, 2, 4, 4))
    sums = targets.product_sums(rand(2, 3, 4))
    assert sums.is_meta and sums.dtype is torch.float64
    assert isinstance(counter.loss, Tensor) and counter.loss.is_meta
    with pytest.raises(NotImplementedError, match="meta"):  # colours return to the device of their ids
        renderings.id_colours(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "more", [[], ["data.in_chans=1", "data.mean=[0.4]", "data.std=[0.2]", "model.patch_size=[4,8]"]]
)
def test_pca_of_the_pass_of_stats_is_that_of_the_start(tmp_path, more):
    tiny = [*TINY, *more, "target=pca", "target.components=9", "target.images=50"]
    of_stats = [override for override in tiny if not override.startswith("task.")]
    assert run_here(tmp_path / "stats", "task=stats", *of_stats) == 0
    one_step = [*TINY_PRETRAIN, *tiny, "task.max_steps=1"]
    run_here(tmp_path / "start", *one_step)
    run_here(tmp_path / "file", *one_step, f"target.fitted={tmp_path / 'stats'}")
    weights = [checkpoint.read_weights(checkpoint.checkpoints_of(tmp_path / run)[-1]) for run in ("start", "file")]
    for name in ("target.basis", "target.mean"):
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=2e-6, rtol=0)
    log = (tmp_path / "file" / "log.txt").read_text()
    assert f"fitted from {tmp_path / 'stats'}" in log and "training images" not in log
    assert "fitting target=pca to 50 training images" in (tmp_path / "start" / "log.txt").read_text()


def test_sums_of_other_patches_are_refused(tmp_path):
    run_here(tmp_path, "task=stats", *(o for o in TINY if not o.startswith("task.")), "target=pca")
    for fitted, patches, sentence in (
        (
            tmp_path,
            Patches((2, 2), (8, 8), 3, False),
            r"is of model.patch_size=\[4, 4\], and this model has \[8, 8\]: run",
        ),
        (
            tmp_path,
            Patches((2, 2), (4, 4), 3, False),
            r"is of model.img_size=\[16, 16\], and this model has \[8, 8\]: run",
        ),
        (tmp_path, Patches((4, 4), (4, 4), 1, False), r"is of model.in_chans=3, and this model has 1: run task=stats"),
        (tmp_path / "log.txt", Patches((4, 4), (4, 4), 3, False), r"log.txt holds no sums of patches: name a run of"),
        (
            tmp_path / "none",
            Patches((4, 4), (4, 4), 3, False),
            r"none holds no sums of patches: name a run of task=stats",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            PcaTarget(patches, components=3, images=None, fitted=str(fitted)).fit_from_file()


def test_a_damaged_file_of_sums_is_refused_in_a_sentence(tmp_path):
    np.savez(tmp_path / "whole.npz", sums=np.zeros((4, 4)))
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "empty.npz").touch()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.npz").write_bytes(content[:100] + bytes([content[100] ^ 255]) + content[101:])
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("whole.npz", "empty.npz", "cut.npz", "flipped.npz", "array.npy"):
        target = PcaTarget(Patches((4, 4), (4, 4), 3, False), components=3, images=None, fitted=str(tmp_path / name))
        with pytest.raises(UserError, match=rf"{name} holds no sums of patches: name a run of task=stats target=pca"):
            target.fit_from_file()


def plain_hog(image: np.ndarray, cell: int) -> np.ndarray:
    """Histograms (rows, columns, 9) of one channel, pixel by pixel."""
    padded = np.pad(image, 1, mode="reflect")
    height, width = image.shape
    histogram = np.zeros((height // cell, width // cell, 9))
    smooth = np.array([1, 2, 1])
    for y in range(height):
        for x in range(width):
            window = padded[y : y + 3, x : x + 3]
            dx = smooth @ (window[:, 0] - window[:, 2])
            dy = smooth @ (window[0] - window[2])
            bin = math.floor(math.atan2(dx, dy) / math.pi * 9) % 9
            histogram[y // cell, x // cell, bin] += math.hypot(dx, dy)
    return histogram / np.linalg.norm(histogram, axis=-1, keepdims=True)


def hog_cells(images: Tensor, cell: int) -> np.ndarray:
    """(B, C, rows of cells, columns of cells, 9) of images, by the target on patches of 8 pixels."""
    grid = (images.shape[2] // 8, images.shape[3] // 8)
    target = HogTarget(Patches(grid, SIDE, images.shape[1], False), orientations=9, cell=cell)
    per = 8 // cell
    values = target(images, images).unflatten(1, grid).unflatten(3, (per, per, images.shape[1], 9))
    return values.permute(0, 5, 1, 3, 2, 4, 6).flatten(2, 3).flatten(3, 4).numpy()


@pytest.mark.parametrize("cell", [8, 4])
def test_hog_is_a_plain_computation_s(cell):
    images = rand(1, 2, 16, 24).double()
    cells = hog_cells(images, cell)
    for channel in range(2):
        np.testing.assert_allclose(cells[0, channel], plain_hog(images[0, channel].numpy(), cell), atol=1e-12)


def test_hog_is_scikit_image_s():
    """Its differences of two neighbours are Sobel's where an image is a polynomial of degree 2, but for the edges; its
    angles are those of the transposed image."""
    feature = pytest.importorskip("skimage.feature")
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in (32, 48)), indexing="ij")
    powers = torch.stack([x * x, x * y, y * y, x, y])
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 5)))
    images = torch.einsum("bp,phw->bhw", weights, powers)
    ours = hog_cells(images[None], 8)[0]
    for image, cells in zip(images.numpy(), ours, strict=True):
        theirs = feature.hog(
            image.T, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(1, 1), block_norm="L2",
            feature_vector=False,
        )  # fmt: skip
        np.testing.assert_allclose(cells[1:-1, 1:-1], theirs[:, :, 0, 0].transpose(1, 0, 2)[1:-1, 1:-1], atol=1e-4)


def test_hog_does_not_depend_on_how_images_are_normalised_and_is_zero_where_they_are_flat():
    images = rand(1, 3, 16, 24).double()
    scaled = images * torch.tensor([2.0, 0.3, 5.0]).view(3, 1, 1) - 0.7
    np.testing.assert_allclose(hog_cells(images, 8), hog_cells(scaled, 8), atol=1e-10)
    assert not hog_cells(torch.full((1, 3, 16, 24), 0.123), 8).any()


def test_features_are_the_teacher_s_and_the_teacher_is_neither_saved_nor_trained(script):
    target = of_type(FeatureTarget, make("features", script))
    images = rand(2, 3, 16, 24)
    network = small_teacher("").network
    assert network is not None
    with torch.no_grad():
        tokens = network._pos_embed(network.patch_embed(images * 2 - 1))
        for block in list(network.blocks)[:2]:
            tokens = block(tokens)
    torch.testing.assert_close(target(images, images), F.layer_norm(tokens[:, 1:], (12,)))
    model = MaskedAutoencoder(target, **SIZES)
    assert not [name for name in model.state_dict() if name.startswith("target")]
    assert not {*map(id, target.teacher.parameters())} & {*map(id, model.parameters())}
    assert not [p for p in target.teacher.parameters() if p.requires_grad] and not target.teacher.training
    assert (
        next(of_type(FeatureTarget, model.double().target).teacher.parameters()).dtype is torch.float64
    )  # goes where the model goes
    model.train()
    assert not target.teacher.training
    cosine = of_type(FeatureTarget, make("features", script, loss="cosine"))
    pred, values = rand(2, 3, 12), target.float()(images, images)[:, :3]
    by_hand = 1 - (F.normalize(pred, dim=-1) * F.normalize(values, dim=-1)).sum(-1).mean()
    assert float(cosine.loss(pred, values)) == pytest.approx(float(by_hand), rel=1e-5)
    with pytest.raises(UserError, match=r"target.layer=4 is more than the 3 blocks of target.teacher=small."):
        make("features", script, layer=4)


def test_tokens_of_torchscript_and_onnx(script, tmp_path):
    images = rand(2, 3, 16, 24)
    target = of_type(TokenTarget, make("tokens", script))
    ids = target(images, images)
    assert ids.dtype == torch.int64 and torch.equal(ids, Brightness()(images))
    pred = rand(2, 6, VOCABULARY)
    by_hand = -pred.log_softmax(-1).gather(2, ids[..., None]).mean()
    assert float(target.loss(pred, ids)) == pytest.approx(float(by_hand), rel=1e-6)
    undone = make("tokens", script, Patches(GRID, SIDE, 3, False, undo=lambda values: values * 0.5))
    assert torch.equal(undone(images, images), Brightness()(images * 0.5))
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor
    graph = onnx.helper.make_graph(
        [
            node("AveragePool", ["images"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
            node("Slice", ["pooled", "zero", "one", "axis"], ["first"]),
            node("Mul", ["first", "steps"], ["scaled"]),
            node("Cast", ["scaled"], ["whole"], to=onnx.TensorProto.INT64),
            node("Flatten", ["whole"], ["ids"]),
        ],
        "tokens",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["b", 3, 16, 24])],
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["b", 6])],
        [
            tensor("steps", onnx.TensorProto.FLOAT, [], [15.99]),
            *(tensor(n, onnx.TensorProto.INT64, [1], [v]) for n, v in (("zero", 0), ("one", 1), ("axis", 1))),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(tmp_path / "tokens.onnx"))
    of_onnx = make("tokens", tmp_path / "tokens.onnx")(images, images)
    assert torch.equal(of_onnx, Brightness()(images[:, :1].expand(-1, 3, -1, -1)))


def test_tokenizers_that_cannot_be_used_are_refused(script, tmp_path):
    images, bad = rand(1, 3, 16, 24), tmp_path / "bad.pt"
    bad.write_bytes(b"no file")
    (tmp_path / "bad.onnx").write_bytes(b"no file")
    torch.jit.save(torch.jit.trace(nn.Flatten(), images), str(tmp_path / "floats.pt"))
    torch.jit.save(torch.jit.trace(Twice(), images), str(tmp_path / "pair.pt"))
    for path, vocabulary, sentence in (
        (bad, 16, r"bad.pt is no TorchScript file: save the tokenizer by torch.jit.save, or as FILE.onnx."),
        (tmp_path / "bad.onnx", 16, r"bad.onnx is no ONNX file that onnxruntime reads"),
        (tmp_path / "none.pt", 16, r"none.pt does not exist: name a TorchScript or an ONNX file."),
        (tmp_path / "floats.pt", 16, r"gives 1 x 1152 values of float32 for 1 images, and not the whole numbers of 6"),
        (script, 3, r"gives ids from \d+ to \d+, and target.vocabulary=3 allows those from 0 to 2: raise it."),
        (tmp_path / "pair.pt", 16, r"pair.pt gives a tuple for 1 images, and not the whole numbers of 6 patches each."),
    ):
        with pytest.raises(UserError, match=sentence):
            make("tokens", path, vocabulary=vocabulary)(images, images)


class Nearest(nn.Module):
    """A tokenizer of images with three channels alone: a convolution's likeliest channel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).argmax(1).flatten(1)


def test_images_that_a_tokenizer_does_not_take_are_named(tmp_path):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    images = rand(2, 3, 16, 24)
    torch.jit.save(torch.jit.trace(Nearest(), images), str(tmp_path / "three.pt"))
    torch.onnx.export(Nearest(), (images,), str(tmp_path / "three.onnx"), dynamo=False)
    grey, large = rand(2, 1, 16, 24), rand(2, 3, 32, 48)
    end = r"\. Set data.in_chans and data.img_size to those that it was made for, or name another file\.$"
    for name, wrong, sentence in (
        (
            "three.pt",
            grey,
            r"three.pt takes no images of 2 x 1 x 16 x 24 values: Given groups=1, weight of size \[16, 3",
        ),
        ("three.onnx", grey, r"three.onnx takes no images of 2 x 1 x 16 x 24 values: .*invalid dimensions"),
        ("three.onnx", large, r"three.onnx takes no images of 2 x 3 x 32 x 48 values: .*invalid dimensions"),
    ):
        patches = Patches(GRID, SIDE, wrong.shape[1], False)
        with pytest.raises(UserError, match=sentence) as caught:
            make("tokens", tmp_path / name, patches)(wrong, wrong)
        assert re.search(end, str(caught.value))
    with pytest.raises(UserError, match=r"three.pt gives 2 x 24 values of int64 for 2 images, and not the whole numbe"):
        make("tokens", tmp_path / "three.pt")(large, large)


def test_ids_of_any_batch_that_the_vocabulary_lacks_make_the_loss_nan_and_are_named(script):
    target = of_type(TokenTarget, make("tokens", script, vocabulary=8))
    dark, bright = torch.full((2, 3, 16, 24), 0.3), torch.full((2, 3, 16, 24), 0.9)
    assert target(dark, dark).max() < 8
    with pytest.raises(UserError, match=r"gives ids from 14 to 14, and target.vocabulary=8 allows those from 0 to 7: "):
        target(bright, bright)
    pred, ids = rand(2, 6, 8).requires_grad_(), target(dark, dark)
    assert torch.equal(target.loss(pred, ids), F.cross_entropy(pred.flatten(0, 1), ids.flatten()))
    ids[1, 2] = OUTSIDE  # as the target marks it on a GPU, for whose answer no step waits
    assert target.loss(pred, ids).isnan()


# ---------------------------------------------------------------- the config


def test_a_target_alone_is_enough_on_the_command_line():
    cfg = composed("masking=block", "target=hog")
    assert cfg.target.cell == 4 and cfg.task.norm_pix_loss is False  # patches of 4 pixels
    assert composed("model=vit_base", "data.img_size=224", "target=hog").target.cell == 8
    assert composed("model=vit_huge", "data.img_size=224", "target=hog").target.cell == 7  # patches of 14 pixels
    assert composed("target=pca").target.components == 48 and composed().task.norm_pix_loss is True
    assert composed("model=vit_base", "data.img_size=224", "target=pca").target.components == 96


def test_the_default_target_leaves_a_run_its_directory():
    assert not [key for key in identity(composed()) if key.startswith("target")]
    assert identity(composed("target=hog"))["target.name"] == "hog"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["target=hog", "task.norm_pix_loss=true"],
            r"task.norm_pix_loss=true normalises pixels, which target=hog does",
        ),
        (["task=stats", "target=hog"], r"target=hog does nothing with task=stats, which fits target=pca alone"),
        (["task=stats", "target=pca", "target.fitted=x"], r"target.fitted is of pre-training: task=stats measures the"),
        (
            ["target=pca", "model.patch_size=[4]"],
            r"model.patch_size must be one number or .*, got \[4\]",
        ),
        (["target=hog", "model.patch_size=8.5"], r"model.patch_size must be .*, got 8.5"),
        (["target=pca", "model.patch_size=auto"], r"model.patch_size must be .*, got 'auto'"),
        (
            ["target=hog", "target.cell=3"],
            r"target.cell=3 does not divide a patch of 4 x 4 pixels \(model.patch_size\)",
        ),
        (["target=pca", "target.components=96"], r"target.components=96 is more than the 48 values of a patch: lower"),
        (["target=features"], r"target.teacher has no value: give it one, as target.teacher=..."),
        (["target=tokens"], r"target.file has no value: give it one, as target.file=..."),
        (["target=tokens", "target.file=none.pt"], r"target.file=\S*none.pt does not exist."),
        (["target=pca", "target.fitted=none"], r"target.fitted=\S*none does not exist."),
        (["task.mask_ratio=[0.9,0.6]"], r"task.mask_ratio must be a number or \[low, high\] with low < high"),
        (["task.mask_ratio=[0.5]"], r"task.mask_ratio must be a number or \[low, high\] with low < high"),
        (["task.mask_ratio=[0.5,1.5]"], r"task.mask_ratio must lie in \(0, 1\), got 1.5."),
        (["task.mask_ratio=[0.5,0.999]"], r"task.mask_ratio=\[0.5, 0.999\] keeps 0 of the 64 patches"),
    ],
)
def test_contradictions_are_refused_in_words(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        composed(*overrides)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory) -> Path:
    """A finished run of the model that the runs here train."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=2", "seed=5") == 0
    return run


@pytest.fixture(scope="module")
def tokens_of_runs(tmp_path_factory) -> Path:
    """A tokenizer of the runs' images, which have patches of 4 pixels."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.pt"

    class Small(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (F.avg_pool2d(images.mean(1, keepdim=True), 4) * 15.99).long().flatten(1)

    torch.jit.save(torch.jit.trace(Small(), rand(2, 3, 16, 16)), str(path))
    return path


def chosen(name: str, teacher_run: Path, tokens_of_runs: Path) -> list[str]:
    """The overrides of a run with a target; `range` stands for pixels with mask ratios from a range."""
    settings = {
        "range": ["task.mask_ratio=[0.5,0.9]"],
        "pca": ["target=pca", "target.components=8"],
        "hog": ["target=hog"],
        "features": ["target=features", f"target.teacher={teacher_run}", "target.layer=1"],
        "tokens": ["target=tokens", f"target.file={tokens_of_runs}", f"target.vocabulary={VOCABULARY}"],
    }
    return [*TINY_PRETRAIN, "task.num_images=2", *settings[name]]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(run / "metrics.jsonl") if "loss" in row]


def resumed(run: Path, arguments: list[str], steps: int) -> None:
    """Runs, is cut after `steps` steps, and goes on."""
    run_here(run, *arguments)
    for path in checkpoint.checkpoints_of(run)[steps:]:
        shutil.rmtree(path)
    (run / "summary.json").unlink()
    run_here(run, *arguments)


def slow_but(name: str, names: list[str]) -> Iterator[object]:
    for each in names:
        yield each if each == name else pytest.param(each, marks=pytest.mark.slow)


RUNS = ["range", "pca", "hog", "features", "tokens"]


@pytest.mark.parametrize("name", [*slow_but("pca", RUNS)])
def test_a_run_resumes_and_is_cut_up_to_the_same_losses(tmp_path, teacher_run, tokens_of_runs, name):
    base = chosen(name, teacher_run, tokens_of_runs)
    often = ["checkpoint.every_epochs=0.2", "checkpoint.keep=100"]
    run_here(tmp_path / "whole", *base, "data.num_workers=1")
    resumed(tmp_path / "cut", [*base, *often], 2)
    run_here(tmp_path / "parts", *base, "task.micro_batch_size=8")
    whole, cut, parts = (losses(tmp_path / run) for run in ("whole", "cut", "parts"))
    assert whole == cut and len(whole) > 4
    assert parts == pytest.approx(whole, rel=1e-5)
    lines = read_json_lines(tmp_path / "whole" / "metrics.jsonl")
    assert any("val/loss_of_patch_mean" in row for row in lines) == (name == "range")
    assert (tmp_path / "whole" / "images").is_dir()
    if name == "pca":
        assert ("fitting target=pca to 144 training images") in (tmp_path / "whole" / "log.txt").read_text()
        assert (tmp_path / "cut" / "log.txt").read_text().count("fitting target=pca") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_have_the_losses_of_one(tmp_path, teacher_run, tokens_of_runs, name):
    base = [*chosen(name, teacher_run, tokens_of_runs), "data.num_workers=0", "task.max_steps=4"]
    run_here(tmp_path / "one", *base)
    two = tmp_path / "two" / "run"
    if name == "pca":  # as a user types it
        process = run_cli(*base, "launcher.processes=2", f"output_dir={two}")
        assert process.returncode == 0, process.stderr
    else:
        on_ranks(2, tmp_path / "two", functools.partial(trained, overrides=base))
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_inductor_and_bf16_have_the_losses_of_plain_blocks(tmp_path, teacher_run, tokens_of_runs, name):
    base = [*chosen(name, teacher_run, tokens_of_runs), "task.max_steps=3"]
    base += ["model.depth=1"] * (name != "features")
    torch._dynamo.reset()
    run_here(tmp_path / "plain", *base)
    run_here(tmp_path / "compiled", *base, "task.compile=blocks")
    run_here(tmp_path / "half", *base, "task.precision=bf16")
    log = (tmp_path / "compiled" / "log.txt").read_text()
    assert "switched off" not in log and "compiled" in log
    plain, compiled, half = (losses(tmp_path / run) for run in ("plain", "compiled", "half"))
    assert compiled == pytest.approx(plain, rel=1e-4) and half == pytest.approx(plain, rel=0.05)
    torch._dynamo.reset()


@pytest.mark.slow
def test_what_follows_a_run_reads_it(tmp_path, teacher_run, tokens_of_runs):
    """Fine-tuning, export, and pictures of a run whose target has buffers."""
    run = tmp_path / "run"
    base = chosen("pca", teacher_run, tokens_of_runs)
    assert run_here(run, *base, "task.max_steps=2") == 0
    init = [*TINY, f"init={run}"]
    assert run_here(tmp_path / "tuned", *init, "task=finetune", "task.max_steps=1", "task.batch_size=32") == 0
    assert run_here(tmp_path / "evaluated", *TINY, "task=evaluate", f"init={tmp_path / 'tuned'}") == 0
    out = tmp_path / "model.safetensors"
    init = [override for override in init if not override.startswith("task.precision")]
    assert run_here(tmp_path / "exported", *init, "task=export", "task.format=safetensors", f"task.path={out}") == 0
    assert run_here(tmp_path / "timm", *init, "task=export", "task.format=timm") == 0
    pictures = ["task=visualize", "task.masks=[random]", "task.mask_ratios=[0.75]", "task.num_images=2"]
    for source in (run, out):
        assert run_here(tmp_path / f"{source.stem}_drawn", *TINY, *pictures, f"init={source}") == 0
    first, second = (tmp_path / f"{n}_drawn" / "images" / "reconstruction_random_75.png" for n in ("run", "model"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(UserError, match=r"Hugging Face's ViTMAE predicts pixels, and this decoder does not"):
        run_here(tmp_path / "hf", *init, "task=export", "task.format=huggingface")


def test_a_decoder_of_another_target_starts_afresh(tmp_path):
    cell = ["target=hog", "target.cell=2"]
    pixels, plain, pca, hog = [], ["task.norm_pix_loss=false"], ["target=pca", "target.components=48"], ["target=hog"]
    runs = {}
    for name, overrides in (("pixels", pixels), ("pca", pca), ("hog", cell)):
        runs[name] = tmp_path / name
        run_here(runs[name], *TINY_PRETRAIN, *overrides, "task.max_steps=1", "task.num_images=2")

    def decoder_is_taken(source: Path, overrides: list[str], note: str) -> bool:
        cfg = composed(*TINY_PRETRAIN, *overrides, f"init={source}")
        norm_pix_loss = bool(cfg.task.norm_pix_loss)
        model = build_autoencoder(cfg, cfg.target, norm_pix_loss, call(Prepare, cfg.data))
        report = load_pretrained(model, read_pretrained(str(source)))
        assert (f"The file's decoder {note}: ours starts afresh." in report.notes) == bool(note), report.notes
        assert "blocks.0.attn.qkv.weight" in report.loaded
        return "decoder_pred.weight" in report.loaded

    assert decoder_is_taken(runs["pixels"], pixels, "")
    assert not decoder_is_taken(runs["pixels"], pca, "predicts target=pixels, and the model's target=pca")
    assert not decoder_is_taken(
        runs["pixels"], plain, "was trained with task.norm_pix_loss=true, and this run has task.norm_pix_loss=false"
    )
    fitted = "predicts target=pca as it was fitted then, and this run fits it anew"
    assert not decoder_is_taken(runs["pca"], pca, fitted)
    assert not decoder_is_taken(runs["hog"], hog, "predicts 108 values of a patch, and the model's 27")
    assert decoder_is_taken(runs["hog"], cell, "")
    bare = tmp_path / "bare.pth"  # says nothing of its target
    weights = checkpoint.read_weights(checkpoint.checkpoints_of(runs["pixels"])[-1])
    torch.save({"model": weights, "args": {"num_heads": 2, "decoder_num_heads": 2}}, bare)
    assert decoder_is_taken(bare, plain, "")


def test_a_teacher_that_sees_other_patches_is_refused(tmp_path, teacher_run):
    base = [*TINY_PRETRAIN, "target=features", "task.max_steps=1"]
    for overrides, sentence in (
        (
            [f"target.teacher={teacher_run}", "model.patch_size=8"],
            r"has 4 x 4 patches of 4 x 4 pixels, and the model 2",
        ),
        ([f"target.teacher={teacher_run}", "data.img_size=32"], r"has 4 x 4 patches of 4 x 4 pixels, and the model 8"),
        ([f"target.teacher={teacher_run}", "data.in_chans=1"], r"sees 3 channels and the model 1: set data.in_chans=3"),
        (["target.teacher=/nowhere"], r"target.teacher=/nowhere does not exist. Name a run directory"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_here(tmp_path / "run", *base, *overrides)


def test_a_teacher_of_timm_sees_images_as_it_was_trained(tmp_path, monkeypatch):
    net: dict[str, Any] = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    network: Any = timm.create_model("vit_tiny_patch16_224", **net, norm_layer=LayerNorm).eval()
    monkeypatch.setattr(weight_files.timm, "create_model", lambda name, pretrained: network)
    cfg = composed(*TINY_PRETRAIN, "target=features", "target.teacher=timm:vit_tiny_patch16_224", "target.loss=mse")
    prepare = call(Prepare, cfg.data)
    target = build_autoencoder(cfg, cfg.target, False, prepare).target
    pixels = (rand(2, 3, 16, 16) * 255).round()
    images = prepare(pixels.to(torch.uint8))
    with torch.no_grad():
        tokens = network.forward_features((pixels / 255 - 0.5) / 0.5)  # its own mean and deviation
    torch.testing.assert_close(target(images, images), F.layer_norm(tokens[:, 1:], (24,)), atol=1e-3, rtol=0)


def test_colours_of_patches_that_are_not_finite_are_black():
    target = torch.randn(1, 6, 4)
    target[0, 2] = torch.nan
    colours, _ = renderings.principal_colours(target, torch.randn(1, 6, 4))
    assert colours.isfinite().all() and colours[0, 2].tolist() == [0.0, 0.0, 0.0] and colours[0, 3].sum() > 0
    for pictures in renderings.principal_colours(torch.full((1, 6, 4), torch.inf), target):
        assert pictures.shape == (1, 6, 3) and not pictures.any()


def teacher_file(path: Path, channels: int = 3, **args: object) -> tuple[Path, VisionTransformer]:
    """A file of a timm network of width 128 and 4 heads, with what it says of itself."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes: dict[str, Any] = dict(img_size=16, patch_size=4, embed_dim=128, depth=1, num_heads=4, num_classes=0)
        network: Any = timm.create_model("vit_tiny_patch16_224", **sizes, in_chans=channels, norm_layer=LayerNorm)
    torch.save({"model": network.state_dict(), "args": args}, path)
    return path, network.eval()


def test_a_file_without_statistics_is_a_teacher_of_images_as_imagenet_s(tmp_path, caplog):
    path, network = teacher_file(tmp_path / "teacher.pth", num_heads=4)
    cfg = composed(*TINY_PRETRAIN, "target=features", f"target.teacher={path}", "target.loss=mse")
    prepare = call(Prepare, cfg.data)
    caplog.set_level("INFO")
    target = build_autoencoder(cfg, cfg.target, False, prepare).target
    pixels = (rand(2, 3, 16, 16) * 255).round()
    images = prepare(pixels.to(torch.uint8))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    with torch.no_grad():
        tokens = network.blocks(network._pos_embed(network.patch_embed((pixels / 255 - mean) / std)))
    torch.testing.assert_close(target(images, images), F.layer_norm(tokens[:, 1:], (128,)), atol=1e-3, rtol=0)
    assert "does not say how images were normalised: by ImageNet's mean and std, it is assumed" in caplog.text
    assert f"target.teacher={path}: recognised as" in caplog.text and "init=" not in caplog.text


def test_a_run_of_an_earlier_version_goes_on_with_its_teacher_s_statistics(tmp_path, caplog):
    path, _ = teacher_file(tmp_path / "teacher.pth", num_heads=4)
    cfg = composed(*TINY_PRETRAIN, "target=features", f"target.teacher={path}")
    target = of_type(FeatureTarget, build_autoencoder(cfg, cfg.target, False, call(Prepare, cfg.data)).target)
    teacher, now = target.teacher, target.teacher.state_dict()
    earlier = now | {"scale": torch.ones(3, 1, 1), "shift": torch.zeros(3, 1, 1)}
    other = {name: tensor.clone() for name, tensor in now.items()} | {"network.pos_embed": torch.zeros(1, 17, 128)}
    scale = teacher.scale.clone()
    assert not torch.equal(scale, earlier["scale"])
    restore_teacher(teacher, checkpoint.weights_digest(now), "FILE")
    assert torch.equal(teacher.scale, scale) and "when the run began" not in caplog.text
    restore_teacher(teacher, checkpoint.weights_digest(other), "FILE")
    assert torch.equal(teacher.scale, scale) and "target.teacher=FILE has other weights than when the" in caplog.text
    restore_teacher(teacher, checkpoint.weights_digest(earlier), "FILE")
    assert torch.equal(teacher.scale, earlier["scale"]) and torch.equal(teacher.shift, earlier["shift"])
    assert "target.teacher=FILE: it still sees images by data.mean and data.std, as when the run began" in caplog.text


@pytest.mark.parametrize(
    ("channels", "args", "sentence"),
    [
        (3, {}, r"^target.teacher=\S+ \(.*\) does not say its number of heads: state it in the file, as torch.save"),
        (1, {"num_heads": 4}, r"does not say how its 1 channels were normalised: state it in the file, as torch.save"),
        (
            1,
            {"num_heads": 4, "mean": [0.5] * 3, "std": [0.5] * 3},
            r"has 1 channels, and states a mean of 3 values: st",
        ),
    ],
)
def test_what_a_teacher_s_file_does_not_say_is_asked_for(tmp_path, channels, args, sentence):
    path, _ = teacher_file(tmp_path / "teacher.pth", channels, **args)
    of_data = [f"data.in_chans={channels}", f"data.mean={[0.4] * channels}", f"data.std={[0.2] * channels}"]
    cfg = composed(*TINY_PRETRAIN, "target=features", f"target.teacher={path}", *of_data)
    with pytest.raises(UserError, match=sentence):
        build_autoencoder(cfg, cfg.target, False, call(Prepare, cfg.data))


def test_the_reference_s_files_have_the_heads_of_their_networks(caplog):
    state = {"patch_embed.proj.weight": torch.empty(1280, 3, 14, 14, device="meta")}
    state |= {"blocks.31.mlp.fc1.weight": torch.empty(5120, 1280, device="meta")}
    file = PretrainedWeights("mae_pretrain_vit_huge.pth", "reference", state, [], Metadata())
    assert number_of_heads(file, "") == 16
    assert "init=mae_pretrain_vit_huge.pth (reference): taken to have 16 heads, as timm's models of" in caplog.text


def test_a_plan_counts_the_teacher_once_and_opens_no_tokenizer(teacher_run):
    features = [*TINY_PRETRAIN, "target=features", f"target.teacher={teacher_run}"]
    counted = operations(composed(*features), model_on_meta(composed(*features)))
    assert counted[0].target > counted[0].encoder  # of all patches, and not of a quarter
    trained = counted[0].encoder + counted[0].decoder
    assert counted[1] == 3 * trained + counted[0].target
    tokens = composed(*TINY_PRETRAIN, "target=tokens", "target.file=none.pt", "dry_run=true")
    assert "GFLOPs an image" in report(tokens)
    low, high = (composed(*TINY_PRETRAIN, f"task.mask_ratio={ratio}") for ratio in ("[0.5,0.9]", "0.7"))
    assert operations(low, model_on_meta(low)) == operations(high, model_on_meta(high))
