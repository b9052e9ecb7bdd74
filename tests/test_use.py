"""A run or a file as a model: `mae.load`, torch.hub, task=embed, task=predict, and docs/use.md as it stands."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY_PRETRAIN, composed, of_type, run_here
from PIL import Image
from test_evaluate import work_on
from test_tasks import TINY_FINETUNE, TINY_OTHER, said, summary
from timm.models.vision_transformer import VisionTransformer

import mae
from mae.config.from_run import with_groups
from mae.errors import UserError
from mae.launch import launch
from mae.models.layers import blocks_of
from mae.runs.checkpoints import newest_valid
from mae.tasks.embed import Parts
from mae.tasks.inference import ImageModel
from mae.tasks.inputs import image_sets
from mae.weights.read import read_pretrained

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
    with pytest.raises(UserError, match="^layer=2 is none of the 2 blocks: -2 to 1, or None for"):
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


def without_facts(checkpoint: Path) -> None:
    """A checkpoint as earlier versions wrote them: its manifest says nothing of the run."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest = {key: manifest[key] for key in ("format", "step", "epoch", "saved", "files")}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["step_00000003", "mine"])
def test_a_copied_checkpoint_is_as_good_as_its_run(classifier, classifier_run, tree, tmp_path, name):
    copy = tmp_path / "elsewhere" / name
    shutil.copytree(classifier_run / "checkpoints" / "step_00000003", copy)
    (tmp_path / "config.yaml").write_text("model: {num_heads: 4}\ndata: {mean: [9.0], std: [9.0]}\n")  # of no run
    loaded, file = mae.load(copy), sorted(tree.rglob("*.jpg"))[0]
    assert loaded.classes == CLASSES and torch.equal(loaded.logits(file), classifier.logits(file))
    groups = [with_groups([f"init={source}"])[1:3] for source in (copy, classifier_run)]
    assert groups == [["model=vit_nano", "data=folder"]] * 2
    read = [read_pretrained(str(path)) for path in (copy, copy / "model.safetensors", classifier_run)]
    assert read[0].notes == [] and read[0].preprocessing == read[1].preprocessing == read[2].preprocessing
    embed = ["task=embed", *small(copy, f"data.root={tree}", "model.num_heads=4")]
    heads = "is a vision transformer with num_heads 2, but the model has num_heads 4"
    assert heads in said(*embed, directory=tmp_path / "run")
    file = tmp_path / "x.safetensors"
    export = ["task=export", *small(copy, f"data.root={tree}", "task.format=safetensors", f"task.path={file}")]
    assert run_here(tmp_path / "export", *export) == 0
    assert "| task.max_steps | 3 |" in (tmp_path / "x.md").read_text() and mae.load(file).classes == CLASSES


def test_an_earlier_version_s_checkpoint_outside_of_its_run_is_noted(autoencoder_run, tmp_path):
    checkpoint = newest_valid(autoencoder_run)
    assert checkpoint is not None
    shutil.copytree(autoencoder_run, tmp_path / "run")
    shutil.copytree(checkpoint, tmp_path / "run" / "deep" / checkpoint.name)  # two folders below a config.yaml
    for folder in ("checkpoints", "deep"):
        without_facts(tmp_path / "run" / folder / checkpoint.name)
    assert read_pretrained(str(tmp_path / "run")).notes == []
    assert read_pretrained(str(tmp_path / "run" / "checkpoints" / checkpoint.name)).sizes.get("num_heads") == 2
    copied = read_pretrained(str(tmp_path / "run" / "deep" / checkpoint.name))
    assert copied.notes[-1].startswith(
        "Neither its manifest nor a run around it says how its tensors are used. Assumed"
    )
    assert copied.preprocessing is None and "num_heads" not in copied.sizes
    with pytest.raises(UserError, match="does not say its number of heads"):
        mae.load(tmp_path / "run" / "deep" / checkpoint.name)


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


# ---------------------------------------------------------------- task=embed


def small(run: Path, *more: str) -> list[str]:
    """A command on the classifier's run, with its model and the data that a command line would take over."""
    model = [override for override in TINY_OTHER if not override.startswith("data.")]
    data = ["data=folder", "data.img_size=16", "data.crop_fraction=0.8", "data.exif_orientation=true"]
    return [*model, *data, f"init={run}", "data.num_workers=0", *more]


def names_in(table: Path) -> list[str]:
    return [row["file"] for row in csv.DictReader(table.read_text().splitlines())]


def test_features_are_of_all_images_whatever_part_is_trained_on(classifier_run, tree, tmp_path):
    for name, more in {"all": [], "part": ["data.fraction=0.5", "data.per_class=1"]}.items():
        assert run_here(tmp_path / name, "task=embed", *small(classifier_run, f"data.root={tree}", *more)) == 0
    assert len(names_in(tmp_path / "all" / "features.csv")) == len(names_in(tmp_path / "part" / "features.csv")) == 18
    words = "data.fraction and data.per_class choose what is trained on: task=embed takes all images"
    texts = {name: (tmp_path / name / "log.txt").read_text() for name in ("all", "part")}
    assert words in texts["part"] and words not in texts["all"]


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    """A flat folder without labels: seven photos, and a file that is none."""
    root = tmp_path_factory.mktemp("flat")
    for k in range(7):
        photo(k, "L" if k == 2 else "RGB").save(root / f"{k}.jpg")
    (root / "3bad.jpg").write_bytes(b"no image")
    return root


def embed_command(run: Path, root: Path, *more: str) -> list[str]:
    parts = ["task.batch_size=2", "task.part_batches=1", "data.max_bad_fraction=0.5"]
    return ["task=embed", *small(run, f"data.root={root}", *parts, *more)]


def test_features_have_the_names_of_an_unlabelled_folder_on_one_rank_and_on_two(
    classifier, classifier_run, mixed, tmp_path
):
    arrays = []
    for world in (1, 2):
        run, command = tmp_path / f"on_{world}", embed_command(classifier_run, mixed)
        launch.prepare(composed(*command, f"output_dir={run}"), command)
        work_on(world, run)
        arrays.append(np.load(run / "features.npy"))
        names = names_in(run / "features.csv")
        assert names == [f"{k}.jpg" for k in range(7)] and not (run / "parts").exists()
        assert summary(run)["rows"] == 7 and summary(run)["bad"] == 1 and summary(run)["files"][0] == "features.npy"
        bad = "".join(path.read_text() for path in run.glob("bad_files*.csv"))
        assert "3bad.jpg" in bad and "not an image of a known kind" in bad
    assert (arrays[0] == arrays[1]).all() and arrays[0].dtype == np.float32
    expected = classifier.embed([mixed / name for name in names])
    torch.testing.assert_close(torch.from_numpy(arrays[0]), expected, atol=1e-6, rtol=1e-6)


def test_killed_and_started_again_only_what_is_missing_is_computed(classifier_run, mixed, tmp_path, monkeypatch):
    written: list[int] = []
    write = Parts.write

    def recorded(self, number, index, feature):
        if len(written) == 2:
            raise RuntimeError("killed here")
        written.append(number)
        write(self, number, index, feature)

    command = embed_command(classifier_run, mixed, "task.pooling=patches", "task.layer=-1", "task.dtype=float16")
    assert run_here(tmp_path / "whole", *command) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "write", recorded)
        with pytest.raises(RuntimeError, match="killed here"):
            run_here(tmp_path / "again", *command)
        assert written == [0, 1]
        patched.setattr(
            Parts, "write", lambda self, number, *rest: (written.append(number), write(self, number, *rest))
        )
        assert run_here(tmp_path / "again", *command) == 0
    assert written == [0, 1, 2, 3]
    whole, again = (np.load(tmp_path / name / "features.npy") for name in ("whole", "again"))
    assert whole.shape == (7, 16, 32) and whole.dtype == np.float16 and (whole == again).all()


def test_no_file_of_a_user_is_overwritten_beside_the_features(classifier_run, mixed, tmp_path):
    (tmp_path / "out.csv").write_text("my own labels")
    message = said(
        *embed_command(classifier_run, mixed, f"task.path={tmp_path / 'out.npy'}"), directory=tmp_path / "run"
    )
    assert f"{tmp_path / 'out.csv'} exists already, and is not overwritten. Choose another path." in message
    assert (tmp_path / "out.csv").read_text() == "my own labels" and not (tmp_path / "out.npy").exists()


def test_a_run_that_was_killed_between_its_files_goes_on(classifier_run, mixed, tmp_path, monkeypatch):
    def killed(*arguments):
        raise RuntimeError("killed here")

    embed = embed_command(classifier_run, mixed, f"task.path={tmp_path / 'x.npy'}")
    labels = ["task=predict", *small(classifier_run, f"data.root={mixed}", "data.max_bad_fraction=0.5")]
    labels += [f"task.path={tmp_path / 'out'}"]
    for command, function, file in (
        (embed, "embed.write_csv", "x.npy"),
        (labels, "predict.contact_sheet", "out/labels.csv"),
    ):
        run, other = tmp_path / function, tmp_path / f"other_{function}"
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed here"):
            patched.setattr(f"mae.tasks.{function}", killed)
            run_here(run, *command)
        first = (tmp_path / file).read_bytes()
        assert "exists already, and is not overwritten" in said(*command, directory=other)
        with (run / "outputs.jsonl").open("a") as notes:
            notes.write('\n{"path": "/cut sh')
        assert run_here(run, *command) == 0 and (tmp_path / file).read_bytes() == first
        (run / "summary.json").unlink()
        (tmp_path / file).write_bytes(first[::-1])  # a user's file of the same size
        assert "exists already, and is not overwritten" in said(*command, directory=run)
    assert names_in(tmp_path / "x.csv") == [f"{k}.jpg" for k in range(7)]


def test_features_of_labelled_splits_in_one_parquet_file(classifier, classifier_run, tree, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tree)
    photos(tmp_path / "data" / "val", CLASSES, 2)
    target = tmp_path / "out" / "x.parquet"
    more = ["task.format=parquet", f"task.path={target}", "data.follow_links=true", "task.batch_size=4"]
    command = ["task=embed", *small(classifier_run, f"data.root={tmp_path / 'data'}", *more)]
    assert run_here(tmp_path / "run", *command) == 0
    table = parquet.read_table(target)
    assert table.column_names == ["file", "split", "label", "feature"] and len(table) == 24
    assert table["split"].to_pylist() == ["train"] * 18 + ["val"] * 6
    assert all(row["file"].startswith(row["label"]) for row in table.select(["file", "label"]).to_pylist())
    feature = torch.tensor(table["feature"].to_pylist())
    expected = classifier.embed([tree / name for name in table["file"].to_pylist()[:18]])
    torch.testing.assert_close(feature[:18], expected, atol=1e-6, rtol=1e-6)
    message = said(*command, directory=tmp_path / "other")
    assert message.endswith(f"{target} exists already, and is not overwritten. Choose another path.")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "task.layer=2",
            "task.layer=2 is none of the 2 blocks: -2 to 1, or null for the output of the last norm.",
        ),
        ("task.files=[nowhere.jpg]", "task.files names nowhere.jpg, which does not exist."),
        ("task.files=['no*.jpg']", "task.files names no*.jpg, which matches no file."),
        ("task.files=[.]", "task.files names the folder .: type data=folder data.root=., or ./*.jpg."),
        ("task.files=[]", "task.files names no file: give paths or patterns, as task.files=[a.jpg,'photos/*.png']."),
    ],
)
def test_what_cannot_be_embedded_is_refused(classifier_run, override, sentence):
    cfg = composed("task=embed", *small(classifier_run, f"data.root={ROOT}", override))
    with pytest.raises(UserError) as caught:
        if cfg.task.files is None:
            mae.load(classifier_run).check("task.pooling", "avg", "task.layer", cfg.task.layer)
        image_sets(cfg, cfg.task.files, "all")
    assert str(caught.value) == sentence


# ---------------------------------------------------------------- task=predict


def test_labels_of_an_unlabelled_folder_and_of_files_with_a_contact_sheet(classifier, classifier_run, mixed, tmp_path):
    command = ["task=predict", *small(classifier_run, "task.batch_size=3", "data.max_bad_fraction=0.5")]
    rows = []
    for world in (1, 2):
        run, whole = tmp_path / f"on_{world}", [*command, f"data.root={mixed}", "task.top_k=9"]
        launch.prepare(composed(*whole, f"output_dir={run}"), whole)
        work_on(world, run)
        rows.append((run / "labels.csv").read_text())
    assert rows[0] == rows[1]
    table = list(csv.DictReader(rows[0].splitlines()))
    header = ["file", *(f"{name}_{k}" for k in (1, 2, 3) for name in ("class", "probability"))]
    assert list(table[0]) == header and [row["file"] for row in table] == [f"{k}.jpg" for k in range(7)]
    for row in table:
        names, probabilities = classifier.predict(mixed / row["file"])
        assert [row[f"class_{k}"] for k in (1, 2, 3)] == names[0]
        assert [float(row[f"probability_{k}"]) for k in (1, 2, 3)] == pytest.approx(probabilities[0].tolist(), abs=2e-6)
    assert sum(summary(tmp_path / "on_2")["predicted"].values()) == 7
    with Image.open(tmp_path / "on_1" / "images" / "labels.png") as sheet:
        assert sheet.width > 500
    assert "labels" in (tmp_path / "on_1" / "report.html").read_text()

    named = ["task.format=parquet", f"task.files=['{mixed}/[01].jpg','{mixed}/6.jpg']", f"task.path={tmp_path / 'two'}"]
    assert run_here(tmp_path / "files", *command, *named) == 0
    parquet = pytest.importorskip("pyarrow.parquet")
    files = parquet.read_table(tmp_path / "two" / "labels.parquet")
    assert files["file"].to_pylist() == [str(mixed / f"{k}.jpg") for k in (0, 1, 6)]
    assert files["class_1"].to_pylist() == [table[k]["class_1"] for k in (0, 1, 6)]


def test_a_single_file_that_cannot_be_used_is_named(classifier_run, tmp_path):
    (tmp_path / "z.png").write_bytes(b"")
    command = [
        "task=predict",
        *small(classifier_run, f"task.files=['{tmp_path / 'z.png'}']", "data.max_bad_fraction=1"),
    ]
    assert said(*command, directory=tmp_path / "run") == f"{tmp_path / 'z.png'} cannot be used: the file is empty."


def test_labels_of_an_autoencoder_are_refused(autoencoder_run, mixed, tmp_path):
    message = said(*TINY_OTHER, "task=predict", f"init={autoencoder_run}", directory=tmp_path)
    assert "predicts no labels: it has no classes. Fine-tune it (task=finetune init=" in message


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


def test_the_commands_in_docs_compose(classifier_run, mixed):
    commands = re.findall(r"^python run\.py (.+)$", TEXT, re.M)
    assert len(commands) >= 5
    for command in commands:
        arguments = shlex.split(command.replace("RUN", str(classifier_run)).replace("DIR", str(mixed)), comments=True)
        assert composed(*arguments).task.name in ("embed", "predict", "export")
