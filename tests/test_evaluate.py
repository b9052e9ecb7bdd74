"""Evaluation: exact over ranks, right by hand, and on the robustness sets in their authors' layouts."""

import csv
import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.multiprocessing as mp
from conftest import composed, make_source, of_type, run_here
from PIL import Image
from test_tasks import TINY_OTHER, folder_of, summary, tiny_classifier

from mae import engine
from mae.checkpoint import weights_digest
from mae.data.sources.robustness import ALEXNET_ERRORS, corruption_errors, robustness, synsets
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.launch import launch
from mae.metrics import MISS, Collector, Results
from mae.tasks.init_weights import same_weights

FIGURES = ("top1", "top5", "loss", "ece", "mean_per_class", "images_seen")


def results_of(logits: torch.Tensor, label: torch.Tensor) -> Results:
    found = Collector()
    found.add(torch.arange(len(label)), label, logits)
    results = found.results(Ranks(torch.device("cpu")))
    assert results is not None
    return results


def saved(path: Path, classes: int) -> Path:
    """A classifier of random weights, its head loud enough to tell images apart."""
    model = tiny_classifier(classes)
    torch.nn.init.normal_(of_type(torch.nn.Linear, model.head).weight, std=1.0)
    torch.save({"model": model.state_dict()}, path)
    return path


# ---------------------------------------------------------------- over ranks


def evaluated(rank: int, world: int, port: int, run: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert engine.work(run) == 0


def work_on(world: int, run: Path) -> None:
    """Evaluates in as many real processes, forked: they need not import all anew."""
    if world == 1:
        assert engine.work(run) == 0
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(evaluated, (world, port, run), nprocs=world, start_method="fork")  # type: ignore[attr-defined]


def test_one_two_and_three_ranks_give_identical_figures_on_101_images(tmp_path):
    root = tmp_path / "data"
    folder_of(root / "train", {name: 1 for name in "abcde"})
    folder_of(root / "val", {"a": 21, "b": 20, "c": 20, "d": 20, "e": 20})
    init = saved(tmp_path / "model.pth", 5)
    results, rows = [], []
    for world in (1, 2, 3):
        run = tmp_path / f"on_{world}"
        command = [
            *TINY_OTHER,
            "task=evaluate",
            f"init={init}",
            "data=folder",
            f"data.root={root}",
            "task.batch_size=8",
        ]
        launch.prepare(composed(*command, f"output_dir={run}", "data.num_workers=0"), command)
        work_on(world, run)
        results.append({key: summary(run)[key] for key in FIGURES})
        rows.append((run / "predictions.csv").read_text())
    assert results[0] == results[1] == results[2]
    assert results[0]["images_seen"] == 101
    assert rows[0] == rows[1] == rows[2]
    table = list(csv.DictReader(rows[0].splitlines()))
    assert len(table) == 101 and table[0]["file"] == "a/000.png" and table[0]["label"] == "a"
    assert results[0]["top1"] == pytest.approx(100 * sum(row["correct"] == "True" for row in table) / 101)
    assert (tmp_path / "on_1" / "images" / "confusion.png").is_file()
    per_class = list(csv.DictReader((tmp_path / "on_1" / "per_class.csv").read_text().splitlines()))
    assert [int(row["images"]) for row in per_class] == [21, 20, 20, 20, 20]


# ---------------------------------------------------------------- figures by hand


def test_figures_agree_with_plain_formulas():
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(200, 7, generator=generator), torch.randint(0, 7, (200,), generator=generator)
    results = results_of(logits, label)
    assert results.top(1) == pytest.approx(100 * (logits.argmax(1) == label).double().mean().item())
    in_five = (logits.topk(5, 1).indices == label[:, None]).any(1)
    assert results.top(5) == pytest.approx(100 * in_five.double().mean().item())
    assert results.mean_loss() == pytest.approx(torch.nn.functional.cross_entropy(logits, label).item(), rel=1e-5)
    confusion = results.confusion(7)
    assert confusion.sum() == 200 and np.trace(confusion) == (logits.argmax(1) == label).sum()
    assert (confusion.sum(1) == results.per_class(7)[:, 0]).all()

    confidence, predicted = logits.softmax(1).max(1)
    error = 0.0
    for k in range(15):
        inside = (confidence >= k / 15) & (confidence < (k + 1) / 15)
        if inside.any():
            hits = (predicted == label)[inside].double().mean()
            error += float(inside.double().mean() * (hits - confidence[inside].double().mean()).abs())
    assert results.calibration(15)[0] == pytest.approx(error, abs=1e-6)


def test_ties_and_not_a_number_are_no_hits():
    label = torch.tensor([1, 0, 2])
    logits = torch.stack([torch.zeros(3), torch.full((3,), float("nan")), torch.tensor([0.0, 1.0, float("inf")])])
    assert results_of(logits, label).true_rank.tolist() == [1, MISS, MISS]
    results = results_of(logits, label)
    assert results.top(5) == pytest.approx(100 / 3) and results.confidence.tolist() == pytest.approx([1 / 3, 0, 0])
    error, bins = results.calibration(15)
    assert error == pytest.approx((1 / 3) / 3) and bins[:, 0].sum() == 3  # three images, one of them off by 1/3


# ---------------------------------------------------------------- classes and errors


def evaluate(run: Path, init: Path, root: Path, *more: str) -> dict:
    command = [*TINY_OTHER, "task=evaluate", f"init={init}", f"data.root={root}", "data.num_workers=0", *more]
    assert run_here(run, *command) == 0
    return summary(run)


def test_data_with_some_of_the_classes_is_matched_by_name(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    init = saved(run / "checkpoints" / "model.pth", 4)
    (run / "config.yaml").write_text("{}")
    (run / "classes.json").write_text(json.dumps(["ant", "bee", "cat", "dog"]))
    root = folder_of(tmp_path / "data", {"bee": 6, "dog": 6})
    evaluate(tmp_path / "out", init, root, "data=folder", "data.val_fraction=0.5")
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines()))
    assert {row["label"] for row in rows} == {"bee", "dog"}
    assert {row["predicted"] for row in rows} <= {"ant", "bee", "cat", "dog"}


@pytest.mark.parametrize(("names", "message"), [
    (["cat", "dog", "eel"],
     r"knows 3 classes \(cat, dog, eel\), and data.name=folder holds 3 classes \(ant, cat, dog\): cat is a class of "
     "both, and ant is none of the model's. Evaluate on data whose classes are all named as those it was trained on."),
    (["n01", "n02", "n03"], None),
])  # fmt: skip
def test_classes_are_matched_by_order_only_where_no_name_is_shared(tmp_path, names, message):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    init = saved(run / "checkpoints" / "model.pth", 3)
    (run / "classes.json").write_text(json.dumps(names))
    root = folder_of(tmp_path / "data", {"ant": 4, "cat": 4, "dog": 4})
    if message is not None:
        with pytest.raises(UserError, match=message):
            evaluate(tmp_path / "out", init, root, "data=folder", "data.val_fraction=0.5")
        return
    evaluate(tmp_path / "out", init, root, "data=folder", "data.val_fraction=0.5")
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines()))
    assert {row["file"][:3]: row["label"] for row in rows} == {"ant": "n01", "cat": "n02", "dog": "n03"}
    assert "they are matched by their order" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize(("given", "warned"), [("[0.4,0.4,0.4]", True), ("[0.5]", False)])
def test_images_normalised_otherwise_than_in_training_are_told_of(tmp_path, given, warned):
    init = tmp_path / "net"  # a folder of timm's
    init.mkdir()
    safetensors.torch.save_file(tiny_classifier(2).state_dict(), init / "model.safetensors")
    (init / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}')
    root = folder_of(tmp_path / "data", {"a": 4, "b": 4})
    given = [
        "data=folder",
        "data.val_fraction=0.5",
        "data.fraction=1",
        f"data.mean={given}",
        "data.std=[0.25,0.25,0.25]",
    ]
    evaluate(tmp_path / "out", init, root, *given)
    neighbours = [*TINY_OTHER, "task=knn", "task.k=[1]", f"init={init}", f"data.root={root}", *given]
    run_here(tmp_path / "near", *neighbours)
    sentence = "of data.mean=[0.5,0.5,0.5], and these are normalised by [0.4, 0.4, 0.4]: set data.mean=[0.5,0.5,0.5] to"
    for name in ("out", "near"):
        text = (tmp_path / name / "log.txt").read_text()
        assert (sentence in text) == ("was trained on images of data." in text) == warned


def test_val_images_of_knn_are_those_that_could_be_used(tmp_path):
    root = folder_of(tmp_path / "data" / "train", {"a": 4, "b": 4}).parent
    (folder_of(tmp_path / "data" / "val", {"a": 3, "b": 3}) / "a" / "bad.png").write_bytes(b"no image")
    task = ["task=knn", "task.k=[1]", f"init={saved(tmp_path / 'm.pth', 2)}", "data=folder", f"data.root={root}"]
    assert run_here(tmp_path / "near", *TINY_OTHER, *task, "data.fraction=1", "data.max_bad_fraction=0.5") == 0
    assert json.loads((tmp_path / "near" / "summary.json").read_text())["val_images"] == 6


def test_parquet_holds_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    root = folder_of(tmp_path / "data", {"bee": 6, "dog": 6})
    init = saved(tmp_path / "m.pth", 2)
    evaluate(tmp_path / "out", init, root, "data=folder", "data.val_fraction=0.5", "task.predictions=parquet")
    table = parquet.read_table(tmp_path / "out" / "predictions.parquet")
    assert table.column_names == ["file", "label", "predicted", "correct", "confidence", "loss"] and len(table) == 6


def test_a_folder_without_parts_is_evaluated_whole_where_all_is_asked_for(tmp_path):
    root, init = folder_of(tmp_path / "data", {"a": 4, "b": 4}), saved(tmp_path / "m.pth", 2)
    assert evaluate(tmp_path / "tenth", init, root, "data=folder")["images_seen"] == 1
    assert evaluate(tmp_path / "all", init, root, "data=folder", "data.val_fraction=1")["images_seen"] == 8
    with pytest.raises(ValueError, match=r"data\.val_fraction=1 leaves nothing to train on: it must lie in \(0, 1\)"):
        run_here(tmp_path / "no", *TINY_OTHER, "data=folder", f"data.root={root}", "data.val_fraction=1")


def test_the_result_of_another_place_says_so(tmp_path, capsys):
    init = saved(tmp_path / "m.pth", 2)
    for name in ("one", "two"):
        evaluate(tmp_path / "out", init, folder_of(tmp_path / name, {"a": 4, "b": 4}), "data=folder")
    sentence = f"It read data.root={tmp_path / 'one'}: for other images than those choose another output_dir."
    assert sentence in capsys.readouterr().err


def test_a_validation_folder_alone_is_enough(tmp_path):
    root, init = tmp_path / "set", saved(tmp_path / "m.pth", 2)
    folder_of(root / "val", {"a": 4, "b": 4})
    given = ["data=imagenet", "data.num_classes=2"]
    assert evaluate(tmp_path / "out", init, root, *given)["images_seen"] == 8
    with pytest.raises(ValueError, match=r"has no folder train: it must hold train and val \(data.parts\)"):
        run_here(tmp_path / "no", *TINY_OTHER, *given, "task=finetune", f"data.root={root}")


def test_a_missing_package_for_parquet_is_named_before_any_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match="task.predictions=parquet needs the package pyarrow: use task.predictions=csv"
    ):
        run_here(tmp_path, *TINY_OTHER, "task=evaluate", "init=/nowhere", "task.predictions=parquet")


def test_ranks_that_read_different_checkpoints_are_refused():
    def two(other: str) -> Ranks:
        class Two(Ranks):
            def gather(self, value):
                return [value, other]

        return Two(torch.device("cpu"), world=2)

    model = tiny_classifier()
    same_weights(two(weights_digest(model.state_dict())), model)
    with pytest.raises(ValueError, match="ranks have read different checkpoints: name one of them, as init=RUN/check"):
        same_weights(two("another"), model)


@pytest.mark.parametrize(("classes", "message"), [
    ({"a": 4, "b": 4, "c": 4}, "knows 2 classes, but data.name=folder holds 3: evaluate on data with the classes"),
    ({"all": 4}, "task=evaluate needs labels, and the validation images of data.name=folder have none"),
])  # fmt: skip
def test_data_that_a_classifier_cannot_be_evaluated_on_is_named(tmp_path, classes, message):
    root, init = folder_of(tmp_path / "data", classes), saved(tmp_path / "m.pth", 2)
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "out", init, root, "data=folder", "data.val_fraction=0.5")


def test_a_file_without_a_classifier_is_named(tmp_path):
    model = tiny_classifier(0, "token")
    torch.save({"model": model.state_dict()}, tmp_path / "encoder.pth")
    root = folder_of(tmp_path / "data", {"a": 4, "b": 4})
    with pytest.raises(ValueError, match="cannot be evaluated: it holds no classifier. Fine-tune it first"):
        evaluate(tmp_path / "out", tmp_path / "encoder.pth", root, "data=folder", "data.val_fraction=0.5")


# ---------------------------------------------------------------- robustness sets

SOURCE = {"in_chans": 3, "exif_orientation": False, "max_pixels": 10**8, "follow_links": False}


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def source(root: Path, variant: str):
    return make_source(
        robustness, "val", root=str(root), variant=variant, cache_dir=str(root.parent / "cache"), **SOURCE
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(("variant", "folder"), [("a", "imagenet-a"), ("r", "imagenet-r"), ("sketch", "sketch")])
@pytest.mark.parametrize("inside", [True, False])
def test_class_folders_are_labelled_by_imagenet_s_classes(tmp_path, variant, folder, inside):
    known = synsets("_a" if variant == "a" else "_r" if variant == "r" else "")
    for name in (known[7], known[100]):
        image(tmp_path / folder / name / "x.jpg")
    (tmp_path / folder / "README.txt").write_text("as shipped")
    found = source(tmp_path / folder if inside else tmp_path, variant)
    assert found.labels is not None
    assert found.labels.tolist() == [synsets().index(known[7]), synsets().index(known[100])]
    assert found.name(0) == f"{known[7]}/x.jpg" and len(found.classes) == 1000
    if variant == "sketch":
        assert found.subset is None
    else:
        assert found.subset is not None and len(found.subset) == 200
        assert [synsets()[k] for k in found.subset] == list(known)


def test_v2_s_folders_are_numbers_not_words(tmp_path):
    for number in (2, 10, 999):
        image(tmp_path / "imagenetv2-matched-frequency-format-val" / str(number) / "x.jpeg")
    found = source(tmp_path, "v2")
    assert found.labels is not None and sorted(found.labels.tolist()) == [2, 10, 999]


def test_only_the_subset_s_classes_are_asked_for(tmp_path):
    names = synsets("_a")
    for name in names[:3]:
        image(tmp_path / "imagenet-a" / name / "x.jpg")
    init = saved(tmp_path / "m.pth", 1000)
    evaluate(tmp_path / "out", init, tmp_path / "imagenet-a", "data=imagenet_a")
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == list(names[:3])
    assert {row["predicted"] for row in rows} <= set(names)


def test_a_class_outside_of_the_subset_is_named(tmp_path):
    stranger = next(name for name in synsets() if name not in synsets("_r"))
    for name in (synsets("_r")[0], stranger):
        image(tmp_path / "imagenet-r" / name / "x.jpg")
    says = f"holds images of {stranger}, which is not among the 200 classes of ImageNet-R: is it another set"
    with pytest.raises(ValueError, match=says):
        source(tmp_path, "r")


@pytest.mark.parametrize("archives", [True, False])
def test_corruptions_give_mce_by_alexnet_s_errors(tmp_path, archives):
    wnid = synsets()[5]
    for name in ALEXNET_ERRORS:
        for severity in range(1, 6):
            image(tmp_path / "c" / ("digital" if archives else ".") / name / str(severity) / wnid / "x.JPEG")
    results = evaluate(tmp_path / "out", saved(tmp_path / "m.pth", 1000), tmp_path / "c", "data=imagenet_c")
    assert results["images_seen"] == 75 and set(results["corruption_errors"]) == set(ALEXNET_ERRORS)
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines()))
    wrong = {
        name: [r["correct"] == "False" for r in rows if r["file"].startswith(name + "/")] for name in ALEXNET_ERRORS
    }
    expected = [100 * 100 * sum(hits) / len(hits) / ALEXNET_ERRORS[name] for name, hits in wrong.items()]
    assert results["mce"] == pytest.approx(sum(expected) / 15)


def test_mce_is_that_of_alexnet_for_alexnet_and_absent_where_a_corruption_is():
    groups = [f"{name}/{severity}" for name in ALEXNET_ERRORS for severity in range(1, 6)]
    count = 10000
    hit = np.concatenate([np.arange(count) >= round(count * ALEXNET_ERRORS[g.split("/")[0]] / 100) for g in groups])
    group = np.repeat(np.arange(len(groups)), count)
    errors, mce = corruption_errors(groups, group, hit)
    assert mce == pytest.approx(100, abs=0.01) and all(e == pytest.approx(100, abs=0.02) for e in errors.values())
    few = group < 5
    assert corruption_errors(groups[:5], group[few], hit[few])[1] is None


@pytest.mark.parametrize(("variant", "message"), [
    ("c", "holds no corruption of ImageNet-C: folders such as gaussian_noise/1/n01440764."),
    ("sketch", "should hold folders such as n01440764, each with the images of one class"),
])  # fmt: skip
def test_another_layout_is_explained(tmp_path, variant, message):
    image(tmp_path / "data" / "cats" / "x.jpg")
    with pytest.raises(ValueError, match=message):
        source(tmp_path / "data", variant)


def test_a_missing_severity_and_training_on_a_robustness_set_are_named(tmp_path):
    image(tmp_path / "data" / "fog" / "1" / synsets()[0] / "x.JPEG")
    with pytest.raises(ValueError, match="fog lacks the folder 2: all five severities are needed"):
        source(tmp_path / "data", "c")
    with pytest.raises(ValueError, match="ImageNet-A has no training images: use it with task=evaluate."):
        make_source(robustness, "train", root=str(tmp_path), variant="a", cache_dir=None, **SOURCE)


def test_a_classifier_of_other_classes_is_not_evaluated_on_imagenet_s_sets(tmp_path):
    image(tmp_path / "imagenet-a" / synsets("_a")[0] / "x.jpg")
    with pytest.raises(ValueError, match="knows 10 classes, but this data is labelled by ImageNet's 1000"):
        evaluate(tmp_path / "out", saved(tmp_path / "m.pth", 10), tmp_path / "imagenet-a", "data=imagenet_a")
