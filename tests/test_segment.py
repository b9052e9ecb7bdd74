"""Segmentation: windows, counting, losses, and a run from training to evaluation."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, composed, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_evaluate import work_on

import mae
from mae.config.build import build, call
from mae.data import SOURCES
from mae.data.prepare import Prepare
from mae.data.source import IGNORED, Arrays
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.launch import launch
from mae.metrics import PixelCounter
from mae.models.segmenter import segmenter, sliding_logits, window_starts
from mae.tasks.segment import dice_loss, pixel_loss
from mae.tasks.segment_inference import SegmentationModel
from mae.tasks.segment_maps import predict_maps
from mae.tasks.segment_predict import map_names
from mae.tools import dry_run, planned_model

TINY_SCENES = [
    *[override for override in TINY if not override.startswith("data.")],
    *["data=digit_scenes", "data.canvas=24", "data.img_size=24", "data.scenes=24", "data.val_scenes=5"],
]
TINY_SEGMENT = ["task=segment", *TINY_SCENES, "task.batch_size=8", "task.epochs=2", "task.warmup_epochs=1"]


def tiny_model(classes: int = 4, size: int = 16, head: str = "linear"):
    torch.manual_seed(0)
    cfg = composed(*TINY, f"model.img_size={size}")
    return call(segmenter, cfg.model, num_classes=classes, drop_path=0.0, head=head).eval()


# ---------------------------------------------------------------- windows


@settings(max_examples=30)
@given(side=st.integers(16, 100), stride=st.integers(1, 16))
def test_windows_lie_inside_and_cover_every_pixel(side, stride):
    starts = window_starts(side, 16, stride)
    assert {k + start for start in starts for k in range(16)} == set(range(side))
    assert starts == sorted(set(starts)) and all(b - a <= stride for a, b in zip(starts, starts[1:], strict=False))


def test_an_image_of_a_window_s_size_is_computed_as_one():
    model, image = tiny_model(), torch.randn(2, 3, 16, 16)
    assert torch.equal(sliding_logits(model, image, (10, 10), 4), model(image))


def test_overlapping_windows_are_averaged():
    model, image = tiny_model(), torch.randn(1, 3, 22, 18)
    total, count = torch.zeros(1, 4, 22, 18), torch.zeros(22, 18)
    for top in (0, 6):  # of 22 rows: 0 and the last, 22 - 16
        for left in (0, 2):
            total[:, :, top : top + 16, left : left + 16] += model(
                image[:, :, top : top + 16, left : left + 16]
            ).detach()
            count[top : top + 16, left : left + 16] += 1
    for most in (1, 3, 16):
        torch.testing.assert_close(sliding_logits(model, image, (10, 10), most), total / count, atol=1e-5, rtol=1e-5)


def test_maps_have_the_size_of_their_images_whatever_it_is():
    model, prepare = tiny_model(), Prepare(mean=[0.5], std=[0.25])
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((16, 16), (7, 30), (40, 33))]
    maps = list(predict_maps(model, prepare, images, eval_size=None, eval_stride=0.5))
    assert [tuple(m.shape) for m in maps] == [(16, 16), (7, 30), (40, 33)] and maps[0].dtype == torch.uint8
    assert torch.equal(maps[0], model(prepare(images[0][None]))[0].argmax(0).to(torch.uint8))


# ---------------------------------------------------------------- figures and losses


class Shares(Ranks):
    """Ranks whose exchange returns the shares of all that have been counted so far."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.values = []

    def gather(self, value):
        self.values.append(value)
        return self.values


@pytest.mark.parametrize("world", [1, 2, 3])
def test_miou_is_that_of_torchmetrics_with_ignored_pixels_over_any_number_of_ranks(world):
    """Class 4 occurs nowhere and is left out of the mean, as there."""
    torchmetrics = pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(world)
    logits = torch.randn(7, 5, 9, 11, generator=generator)
    logits[:, 4] = -9.0
    label = torch.randint(0, 4, (7, 9, 11), generator=generator, dtype=torch.uint8)
    label[torch.rand(label.shape, generator=generator) < 0.3] = IGNORED
    shares, results = Shares(), None
    for rank in range(world):
        counter = PixelCounter(5)
        for k in range(rank, 7, world):
            counter.add(label[k : k + 1], logits[k : k + 1])
        results = counter.results(shares)  # the last one has the shares of all
    assert results is not None
    figures = results.metrics()
    options = {"num_classes": 5, "ignore_index": IGNORED}
    wide = label.long()
    iou = torchmetrics.JaccardIndex(task="multiclass", average="macro", **options)(logits, wide)
    accuracy = torchmetrics.Accuracy(task="multiclass", average="micro", **options)(logits, wide)
    assert figures["miou"] == pytest.approx(100 * float(iou), rel=1e-6)
    assert figures["pixel_accuracy"] == pytest.approx(100 * float(accuracy), rel=1e-6)
    expected = F.cross_entropy(logits.double(), wide, ignore_index=IGNORED)
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert results.counts.dtype == np.int64 and results.counts.sum() == int((label != IGNORED).sum())


def test_a_rank_without_images_and_maps_without_a_counted_pixel():
    assert PixelCounter(3).results(Shares()) is None
    counter = PixelCounter(3)
    counter.add(torch.full((1, 2, 2), IGNORED, dtype=torch.uint8), torch.randn(1, 3, 2, 2))
    assert counter.results(Shares()) is None


def test_the_loss_is_the_mean_over_counted_pixels_and_zero_without_any():
    logits, label = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 4, 4))
    label[0, :2] = IGNORED
    torch.testing.assert_close(pixel_loss(logits, label), F.cross_entropy(logits, label, ignore_index=IGNORED))
    nothing = pixel_loss(logits, torch.full_like(label, IGNORED))
    nothing.backward()
    assert float(nothing.detach()) == 0.0 and logits.grad is not None and bool((logits.grad == 0).all())


def test_the_dice_loss_is_that_of_segmentation_models():
    smp = pytest.importorskip("segmentation_models_pytorch")
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    label[0, :2] = IGNORED
    torch.testing.assert_close(
        dice_loss(logits, label), smp.losses.DiceLoss("multiclass", ignore_index=IGNORED)(logits, label)
    )
    label[label == 2] = 1
    assert 0 < float(dice_loss(logits, label)) < 1  # the mean over the two classes that occur


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pre-training run and a segmentation from it."""
    folder = tmp_path_factory.mktemp("segment")
    pretrain = ["task=pretrain", *TINY_SCENES, "task.batch_size=8", "task.epochs=1", "task.warmup_epochs=0"]
    assert run_here(folder / "pretrain", *pretrain) == 0
    arguments = [*TINY_SEGMENT, f"init={folder / 'pretrain'}", "task.eval_every_epochs=1", "checkpoint.every_epochs=1"]
    arguments += ["task.dice_weight=0.5", "task.num_images=3"]
    assert run_here(folder / "run", *arguments) == 0
    return folder, arguments


def test_a_run_leaves_figures_tables_and_pictures(trained):
    run = trained[0] / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert {"miou", "pixel_accuracy", "mean_accuracy", "loss", "best_miou"} <= summary.keys() and summary["steps"] == 6
    assert 0 < summary["miou"] <= summary["best_miou"] < 100
    rows = (run / "iou.csv").read_text().splitlines()
    assert rows[0] == "class,pixels,iou,accuracy" and rows[1].startswith("background,")
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
    assert {"loss", "cross_entropy", "dice", "lr"} <= line.keys()
    assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.5 * line["dice"])
    for name in ("segmentation_00000006.png", "iou.png", "confusion_of_pixels.png"):
        assert (run / "images" / name).exists()
    report = (run / "report.html").read_text()
    assert "mean IoU" in report and "segmentation" in report


def test_evaluation_gives_the_figures_of_the_validation(trained, tmp_path):
    assert run_here(tmp_path / "evaluate", "task=evaluate", *TINY_SCENES, f"init={trained[0] / 'run'}") == 0
    figures = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    summary = json.loads((trained[0] / "run" / "summary.json").read_text())
    assert [figures[key] for key in ("miou", "pixel_accuracy", "loss")] == [
        summary[key] for key in ("miou", "pixel_accuracy", "loss")
    ]
    assert (tmp_path / "evaluate" / "images" / "segmentation.png").exists()


def test_maps_whose_classes_have_another_order_are_matched_by_name(trained, tmp_path):
    source = build(SOURCES, composed(*TINY_SCENES).data, "val")
    order = np.random.default_rng(0).permutation(len(source.classes))  # the folder's number of each class
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind / "val").mkdir(parents=True)
    for index in range(len(source)):
        image, truth = source[index]
        values = np.where(truth == IGNORED, IGNORED, order[np.minimum(truth.numpy(), 10)]).astype(np.uint8)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "data" / "images" / "val" / f"{index}.png")
        Image.fromarray(values).save(tmp_path / "data" / "masks" / "val" / f"{index}.png")
    scenes = [override for override in TINY_SCENES if not override.startswith("data")]
    folder = ["data=segmentation_folder", f"data.root={tmp_path / 'data'}", "data.img_size=24", "data.mean=[0.1]"]
    command = ["task=evaluate", *scenes, *folder, f"init={trained[0] / 'run'}", "data.std=[0.22]", "data.num_workers=0"]
    classes = [source.classes[k] for k in np.argsort(order)]
    (tmp_path / "data" / "classes.txt").write_text("\n".join(classes))
    assert run_here(tmp_path / "run", *command) == 0
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary = json.loads((trained[0] / "run" / "summary.json").read_text())
    assert [figures[key] for key in ("miou", "loss")] == [summary[key] for key in ("miou", "loss")]
    assert (tmp_path / "run" / "iou.csv").read_text() == (trained[0] / "run" / "iou.csv").read_text()
    (tmp_path / "data" / "classes.txt").write_text("\n".join(["sky", *classes[1:]]))
    with pytest.raises(UserError, match="is a class of both, and sky is none of the model's"):
        run_here(tmp_path / "other", *command)


def test_an_exported_file_has_the_figures_of_its_run(trained, tmp_path):
    scenes = [override for override in TINY_SCENES if not override.startswith("task.")]
    file = tmp_path / "model.safetensors"
    export = ["task=export", *scenes, f"init={trained[0] / 'run'}", "task.format=safetensors", f"task.path={file}"]
    assert run_here(tmp_path / "export", *export) == 0
    assert "pipeline_tag: image-segmentation" in (tmp_path / "model.md").read_text()
    assert run_here(tmp_path / "evaluate", "task=evaluate", *TINY_SCENES, f"init={file}") == 0
    figures, summary = (
        json.loads((run / "summary.json").read_text()) for run in (tmp_path / "evaluate", trained[0] / "run")
    )
    assert all(figures[key] == summary[key] for key in ("miou", "pixel_accuracy", "loss"))


def test_memory_that_does_not_suffice_for_whole_images_is_said_with_what_saves_it(trained, tmp_path, monkeypatch):
    numbers = []

    def hungry(model, images, stride, most):
        numbers.append(most)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("mae.tasks.segment_maps.sliding_logits", hungry)
    evaluate = ["task=evaluate", *TINY_SCENES, f"init={trained[0] / 'run'}"]
    with pytest.raises(UserError, match="GiB. Set task.batch_size to less than 16, the windows of an image that are"):
        run_here(tmp_path / "evaluate", *evaluate)
    with pytest.raises(UserError, match="GiB. Evaluate on smaller images, or by device=cpu."):
        run_here(tmp_path / "by_window", *evaluate, "task.batch_size=1")
    with pytest.raises(UserError, match="Images are validated whole: set task.eval_size to fewer pixels."):
        run_here(tmp_path / "train", *TINY_SEGMENT, "task.max_steps=1")
    assert numbers == [16, 1, 16]


def test_a_run_goes_on_to_the_same_bits(trained, tmp_path):
    folder, arguments = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    (tmp_path / "run" / "summary.json").unlink()
    assert run_here(tmp_path / "run", *arguments) == 0
    weights = [
        path / "checkpoints" / "step_00000006" / "model.safetensors" for path in (folder / "run", tmp_path / "run")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "goes on from" in (tmp_path / "run" / "log.txt").read_text()


def test_a_frozen_encoder_keeps_its_bits_and_its_head_learns(trained, tmp_path):
    from safetensors.torch import load_file

    arguments = [*TINY_SEGMENT, f"init={trained[0] / 'pretrain'}", "task.frozen=true", "task.max_steps=2"]
    assert run_here(tmp_path / "run", *arguments) == 0
    before, after = (
        load_file(next((path / "checkpoints").glob("step_*")) / "model.safetensors")
        for path in (trained[0] / "pretrain", tmp_path / "run")
    )
    encoder = [name for name in after if not name.startswith("decode_head.")]
    assert len(encoder) > 20 and all(torch.equal(before[name], after[name]) for name in encoder)
    assert float(after["decode_head.conv_seg.bias"].abs().max()) > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["task=segment", *TINY, "data=digits", "task.batch_size=8"],
            "task=segment needs a map of classes for each image",
        ),
        ([*TINY_SEGMENT, "augmentation=finetune"], "augmentation moves pixels in a way that the maps"),
        (["task=finetune", *TINY_SCENES, "task.batch_size=8"], "task=finetune needs labels"),
        (
            [*TINY_SEGMENT, "task.frozen=true"],
            "task.frozen=true trains a head on an encoder that init= gives: set init",
        ),
    ],
)
def test_what_cannot_be_segmented_is_said_in_a_sentence(arguments, sentence, tmp_path):
    with pytest.raises(UserError) as caught:
        run_here(tmp_path / "run", *arguments, "launcher=inline")
    assert sentence in str(caught.value)


# ---------------------------------------------------------------- maps of any images


def test_maps_of_a_data_set_have_the_figures_of_its_evaluation(trained, tmp_path):
    run = trained[0] / "run"
    assert run_here(tmp_path / "run", "task=predict", *TINY_SCENES, f"init={run}", "task.split=val") == 0
    source = build(SOURCES, composed(*TINY_SCENES).data, "val")
    rows = list(csv.DictReader((tmp_path / "run" / "maps.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == [source.name(index) for index in range(5)]
    right, total = 0, 0
    for index, row in enumerate(rows):
        with Image.open(tmp_path / "run" / row["map"]) as image:
            assert image.mode == "P" and image.getpalette("RGB")[765:] == [255, 255, 255]
            values = np.asarray(image)
        truth = source[index][1].numpy()
        right, total = right + int((values == truth).sum()), total + int((truth != IGNORED).sum())
        assert row["class_1"] == source.classes[np.bincount(values.ravel()).argmax()]
        assert float(row["share_1"]) == pytest.approx((values == np.bincount(values.ravel()).argmax()).mean(), abs=1e-6)
    figures = json.loads((run / "summary.json").read_text())
    assert 100 * right / total == pytest.approx(figures["pixel_accuracy"], rel=1e-6)
    predicted = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert predicted["rows"] == 5 and sum(predicted["percent_of_pixels"].values()) == pytest.approx(100, abs=0.01)
    assert (tmp_path / "run" / "images" / "maps.png").exists()
    assert '"maps"' in (tmp_path / "run" / "report.html").read_text()


def test_maps_of_files_have_their_stems_and_are_those_of_mae_load(trained, tmp_path):
    sizes = {"a.jpg": (30, 41), "a.png": (24, 24), "more/b.png": (9, 60)}
    for number, (name, size) in enumerate(sizes.items()):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    paths = [tmp_path / "photos" / name for name in sizes]
    named = f"task.files=[{','.join(map(str, paths))}]"
    command = ["task=predict", *TINY_SCENES, f"init={trained[0] / 'run'}", named, f"task.path={tmp_path / 'out'}"]
    assert run_here(tmp_path / "run", *command) == 0
    model = mae.load(trained[0] / "run")
    assert isinstance(model, SegmentationModel) and len(model.classes) == 11 and model.classes[0] == "background"
    for path, name, values in zip(paths, ("a.jpg.png", "a.png.png", "more/b.png"), model.predict(paths), strict=True):
        with Image.open(tmp_path / "out" / "maps" / name) as image:
            assert (
                tuple(values.shape) == (image.height, image.width) == sizes[str(path.relative_to(tmp_path / "photos"))]
            )
            assert torch.equal(values, torch.from_numpy(np.array(image)))
    assert model.embed(paths).shape == (3, 32) and model.predict(torch.zeros(2, 3, 30, 50))[1].shape == (30, 50)
    with pytest.raises(
        UserError, match="maps holds files, which are not overwritten, such as .*png. Choose another path"
    ):
        (tmp_path / "out" / "maps.csv").unlink()
        run_here(tmp_path / "again", *command)


def test_maps_of_a_run_that_was_killed_are_its_own_when_it_goes_on(trained, tmp_path, monkeypatch):
    def killed(*arguments):
        raise RuntimeError("killed here")

    command = ["task=predict", *TINY_SCENES, f"init={trained[0] / 'run'}", "task.split=val"]
    command += [f"task.path={tmp_path / 'out'}"]
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed here"):
        patched.setattr("mae.tasks.segment_predict.write_table", killed)
        run_here(tmp_path / "run", *command)
    (tmp_path / "out" / "maps" / "mine.txt").write_text("my own notes")
    with pytest.raises(UserError, match=r"maps holds files, which are not overwritten, such as mine\.txt\."):
        run_here(tmp_path / "run", *command)
    (tmp_path / "out" / "maps" / "mine.txt").unlink()
    assert run_here(tmp_path / "run", *command) == 0
    assert (tmp_path / "out" / "maps.csv").exists()


def test_maps_of_images_of_like_names_have_names_of_their_own():
    source = Arrays(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), None, [], "images")
    names = ["a.jpg", "a.png", "a.jpg.png", "b.png", "more/b.png"]
    source.name = names.__getitem__  # type: ignore[method-assign]
    maps = ["a.jpg.png", "a.png.png", "a.jpg.png.png", "b.png", "more/b.png"]
    assert map_names("", source) == maps and map_names("val", source) == [f"val/{name}" for name in maps]


@pytest.mark.slow
def test_a_folder_without_maps_is_segmented_alike_by_one_rank_and_by_two(trained, tmp_path):
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "5.png").write_bytes(b"no image")
    scenes = [override for override in TINY_SCENES if not override.startswith("data")]
    folder = ["data=folder", f"data.root={tmp_path / 'photos'}", "data.img_size=24", "data.max_bad_fraction=0.5"]
    command, texts = ["task=predict", *scenes, *folder, f"init={trained[0] / 'run'}"], []
    for world in (1, 2):
        run = tmp_path / f"on_{world}"
        launch.prepare(composed(*command, f"output_dir={run}"), command)
        work_on(world, run)
        maps = sorted((run / "maps").iterdir())
        assert [path.name for path in maps] == [f"{number}.png" for number in range(5)]
        texts.append([(run / "maps.csv").read_text(), *(path.read_bytes() for path in maps)])
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- decoders of segmentation-models-pytorch

SIZES = {"img_size": 32, "patch_size": 4, "in_chans": 3, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.0}


def test_dpt_is_that_of_the_library_with_the_same_weights():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = segmenter(**SIZES, depth=12, num_classes=5, drop_path=0.0, head="dpt").eval()
    sizes = {key: value for key, value in SIZES.items() if key != "in_chans"}
    peer = smp.DPT("tu-vit_base_patch16_224", encoder_weights=None, classes=5, encoder_depth=4, **sizes).eval()
    state = {
        name.removeprefix("decode_head.") if name.startswith("decode_head.") else f"encoder.model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(("encoder.model.norm.", "encoder.model.head.")) for name in missing)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), peer(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["dpt", "upernet"])
def test_every_parameter_of_a_decoder_learns_and_its_output_is_of_the_image_s_size(head):
    pytest.importorskip("segmentation_models_pytorch")
    model = segmenter(**SIZES, depth=6, num_classes=5, drop_path=0.0, head=head)
    logits = model(torch.randn(2, 3, 32, 32))
    logits.square().mean().backward()
    assert logits.shape == (2, 5, 32, 32)
    assert not [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert list(model.decode_head.blocks) == ([0, 2, 3, 5] if head == "dpt" else [1, 2, 3, 5])


def test_a_head_with_batch_norm_is_planned_by_dry_run():
    pytest.importorskip("segmentation_models_pytorch")
    cfg = composed(*TINY_SEGMENT, "task.head=upernet", "model.depth=4", "model.img_size=32", "data.img_size=32")
    model = dry_run.model_on_meta(cfg)
    few, many = (planned_model.activation_bytes(cfg, model, torch.float32, torch.device("cpu"), k) for k in (2, 8))
    assert few > 0 and many == pytest.approx(4 * few, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"img_size": 24},
            "task.head=dpt needs square patches of a power of 2 and image sides that are multiples of 32",
        ),
        ({"depth": 3}, "this task.head reads 4 blocks, and model.depth=3: choose task.head=linear."),
    ],
)
def test_sizes_that_a_decoder_cannot_take(changes, sentence):
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(UserError) as caught:
        segmenter(**SIZES | {"depth": 4} | changes, num_classes=5, drop_path=0.0, head="dpt")
    assert sentence in str(caught.value)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch.decoders.dpt.decoder", None)
    with pytest.raises(UserError) as caught:
        segmenter(**SIZES, depth=4, num_classes=5, drop_path=0.0, head="dpt")
    assert "pip install 'mae-experiments[segment]'" in str(caught.value)


def test_dpt_on_a_frozen_encoder_without_a_class_token_is_refused(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    sizes = [*TINY_SEGMENT, "model.depth=4", "model.patch_size=4", "data.canvas=32", "data.img_size=32"]
    model = call(segmenter, composed(*sizes).model, num_classes=11, drop_path=0.0, head="linear")
    encoder = {k: v for k, v in model.state_dict().items() if not k.startswith(("decode_head", "cls_token"))}
    torch.save({"model": encoder | {"pos_embed": encoder["pos_embed"][:, 1:]}}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"no class token, which task.head=dpt reads .* choose task.head=linear or"):
        run_here(tmp_path / "run", *sizes, f"init={tmp_path / 'bare.pth'}", "task.head=dpt", "task.frozen=true")


def test_the_table_of_the_page_is_of_its_records():
    records = json.loads((ROOT / "docs" / "segmentation.json").read_text())
    page, means = (ROOT / "docs" / "segmentation.md").read_text(), {}
    for kind, start in (("mae", "masked autoencoder"), ("scratch", "from scratch")):
        miou = [records[f"{kind}_seed_{seed}"]["result"]["miou"] for seed in range(3)]
        means[kind] = sum(miou) / 3
        assert f"| {start} | {', '.join(f'{value:.1f}' for value in miou)} | **{means[kind]:.1f}** |" in page
    assert means["mae"] > means["scratch"]
