"""Weights by an address: the Hugging Face Hub, here a server on loopback, and artifacts of Weights & Biases."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import wandb
from conftest import TINY_PRETRAIN, composed, run_here
from hub_server import TOKEN, Hub, serving
from test_tasks import TINY_OTHER, summary
from wandb.errors import CommError

import mae
from mae.errors import UserError
from mae.runs.checkpoints import newest_valid
from mae.weights.read import read_pretrained

SMALL = [override for override in TINY_OTHER if not override.startswith("data.fraction")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    small = ["task=linprobe", "task.batch_size=32", "task.max_steps=2"]
    first = tmp_path_factory.mktemp("pretrained")
    assert run_here(first, *TINY_PRETRAIN, "task.max_steps=1") == 0
    base = [override for override in TINY_PRETRAIN if not override.startswith("task.") or "precision" in override]
    assert run_here(folder, *base, *small, f"init={first}") == 0
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = huggingface_hub.constants
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def exported(run: Path, out: Path, *more: str) -> None:
    command = ["task=export", f"init={run}", *SMALL, "task.push_to_hub=ann/tiny", *more]
    assert run_here(out, *command) == 0


@pytest.mark.parametrize("file_format", ["timm", "safetensors"])
def test_an_export_goes_to_the_hub_with_its_card_and_comes_back(run, hub: Hub, tmp_path, monkeypatch, file_format):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    exported(run, tmp_path / "out", f"task.format={file_format}")
    assert summary(tmp_path / "out")["hub"] == f"{hub.address}/ann/tiny"
    files = hub.models["ann/tiny"]
    assert {"README.md", "model.safetensors"} <= files.keys()
    card = files["README.md"].decode()
    assert f"| top1 | {summary(run)['top1']:.6g} |" in card and card.startswith("---\nlibrary_name: ")

    model, own = mae.load("hf://ann/tiny"), mae.load(run)
    images = torch.rand(2, 3, 16, 16)
    assert model.classes == own.classes == [str(digit) for digit in range(10)]
    torch.testing.assert_close(model.predict(images).probabilities, own.predict(images).probabilities)
    assert model.crop.covered == own.crop.covered
    command = ["task=evaluate", "init=hf://ann/tiny", *SMALL, "task.precision=fp32"]
    assert run_here(tmp_path / "evaluated", *command) == 0
    assert summary(tmp_path / "evaluated")["top1"] == pytest.approx(summary(run)["top1"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert read_pretrained("hf://ann/tiny").head is not None  # from the cache


def refusal(source: str) -> str:
    with pytest.raises(UserError) as caught:
        read_pretrained(source)
    return str(caught.value)


def test_what_the_hub_refuses_is_said_in_a_sentence(run, hub: Hub, tmp_path, monkeypatch):
    token = "log in with `hf auth login`, or set HF_TOKEN to a token that may"
    with pytest.raises(UserError) as caught:
        exported(run, tmp_path / "out", "task.format=timm")
    assert str(caught.value) == f"task.push_to_hub=ann/tiny: the Hub refuses it (401): {token} write."
    absent = f" is not on the Hub, or is private: check the name, or {token} read."
    assert refusal("hf://ann/none") == f"init=hf://ann/none{absent}"
    hub.models["ann/own"] = {"config.json": b"{}"}
    hub.private.add("ann/own")
    assert refusal("hf://ann/own") == f"init=hf://ann/own{absent}"
    hub.private.clear()
    assert "holds no checkpoint" in refusal("hf://ann/own")
    assert refusal("hf://ann/own@v9") == "init=hf://ann/own@v9: the model is on the Hub, and has no such revision."
    name = "init=hf://own is no model's name: type init=hf://USER/NAME, or hf://USER/NAME@REVISION."
    assert refusal("hf://own") == name
    hub.code = 418
    assert refusal("hf://ann/new").startswith("init=hf://ann/new: the Hub cannot be reached, and the cache of this")
    with pytest.raises(UserError) as caught:
        exported(run, tmp_path / "out", "task.format=timm")
    assert str(caught.value) == "task.push_to_hub=ann/tiny: the Hub answered 418: try again later."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal("hf://ann/new").startswith("init=hf://ann/new: the Hub cannot be reached, and the cache of this")


def test_the_name_on_the_hub_has_a_user():
    with pytest.raises(
        UserError, match=r"^task\.push_to_hub=tiny must be USER/NAME, a model of the Hugging Face Hub\.$"
    ):
        composed("task=export", "task.push_to_hub=tiny")


# ---------------------------------------------------------------- Weights & Biases


class Artifact:
    """A checkpoint as W&B gives it back."""

    version = "v3"

    def __init__(self, files: dict[str, Path]):
        self.files, self.downloads = files, 0

    def download(self, root: str) -> str:
        self.downloads += 1
        for name, path in self.files.items():
            Path(root).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, Path(root) / name)
        return root


@pytest.fixture
def kept(run, tmp_path, monkeypatch) -> Artifact:
    """What `wandb.artifacts=true` keeps of the run; wandb.Api is replaced, as its downloads come from the cloud."""
    checkpoint = newest_valid(run)
    assert checkpoint is not None
    beside = {name: run / name for name in ("config.yaml", "classes.json")}
    artifact = Artifact({path.name: path for path in checkpoint.iterdir()} | beside)

    class Api:
        def artifact(self, name: str, type: str) -> Artifact:
            assert type == "model"
            if name != "ann/mae/tiny:latest":
                raise CommError(f"artifact '{name}' not found")
            return artifact

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return artifact


def test_an_artifact_of_wandb_is_as_good_as_its_run(run, kept, tmp_path):
    model, own = mae.load("wandb:ann/mae/tiny"), mae.load(run)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model.logits(images), own.logits(images), atol=0, rtol=0)
    assert model.classes == own.classes
    assert read_pretrained("wandb:ann/mae/tiny:latest").meta.step == 2 and kept.downloads == 1
    weights = tmp_path / "cache" / "mae" / "wandb" / "ann" / "mae" / "tiny-v3" / "checkpoints" / "step_00000002"
    assert (weights / "model.safetensors").is_file()


def test_artifacts_that_cannot_be_read_are_told_of(kept):
    assert refusal("wandb:ann/mae") == (
        "init=wandb:ann/mae is no artifact's name: type init=wandb:ENTITY/PROJECT/ARTIFACT[:ALIAS]."
    )
    assert refusal("wandb:ann/mae/none:v1") == (
        "init=wandb:ann/mae/none:v1 could not be fetched (artifact 'ann/mae/none:v1' not found). Check entity, "
        "project, artifact and alias, and log in with `wandb login`, or set WANDB_API_KEY."
    )
    del kept.files["manifest.json"]
    assert "(it holds no checkpoint of this program: wandb.artifacts=true keeps one)" in refusal("wandb:ann/mae/tiny")
