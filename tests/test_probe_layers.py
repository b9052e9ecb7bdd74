"""Probes of several layers in one pass: the same as each alone, and what reads their run."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, TINY_PRETRAIN, composed, of_type, run_here
from test_tasks import TINY_OTHER, said, summary, weights
from torch import nn

import mae
from mae.data.source import Arrays
from mae.errors import UserError
from mae.launch.launch import closing_lines
from mae.models.vit import Classifier, block_output
from mae.runs.files import read_json_lines
from mae.runs.summary import Summary
from mae.tasks.base import build_task
from mae.tasks.linprobe_layers import LayersProbe
from mae.tools.planned_model import model_on_meta, operations, parameters
from mae.weights.parts import drop_class_token

PROBE = [*TINY, "task=linprobe", "task.batch_size=32", "optimizer.base_lr=1", "task.log_every_steps=1"]
ATTENTIVE = ["task.probe=attentive", "task.probe_queries=4"]
LAYERS = "task.layer=[null,-1,0]"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("encoder")
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=2") == 0
    return run


@pytest.fixture(scope="module")
def probed(encoder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("probed") / "run"
    assert run_here(run, *PROBE, f"init={encoder}", LAYERS, "task.max_steps=3") == 0
    return run


def probe_of(*overrides: str) -> LayersProbe:
    """The task of a config, on no images of three classes."""
    cfg = composed(*PROBE, "init=run", *overrides)
    return of_type(LayersProbe, build_task(cfg, Arrays(torch.empty(0, 1, 8, 8), None, ["a", "b", "c"], "")))


def same_as_alone(run: Path, alone: Path, layer: str) -> None:
    """A layer among others ends with the numbers that its own run has."""
    row, own = summary(run)["layers"][layer], summary(alone)
    assert [row[name] for name in ("top1", "top5", "loss")] == [own[name] for name in ("top1", "top5", "loss")]


# ---------------------------------------------------------------- one pass


@pytest.mark.parametrize("kind", [[], ATTENTIVE])
def test_blocks_run_once_and_no_further_than_the_deepest_layer(kind):
    task, calls = probe_of("model.depth=4", "task.layer=[0,2,-3]", *kind), []
    for number, block in enumerate(task.model.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    images = torch.randn(3, 3, 16, 16)
    features = task.encode(images)
    assert calls == [0, 1, 2] and features.shape[:2] == (3, 3)
    for number, layer in enumerate((0, 2, 1)):
        tokens = block_output(task.model, images, layer)
        torch.testing.assert_close(features[:, number], tokens[:, 1:] if kind else tokens[:, 0], rtol=0, atol=0)
    assert (task.model.layer, task.model.head) == (2, task.heads[1])  # the deepest, before a validation


def test_a_layer_s_gradient_is_that_of_its_own_loss():
    task = probe_of("task.layer=all")
    assert task.layers == [0, 1]
    features, label = torch.randn(8, 2, 32), torch.arange(8) % 3
    matrices = [of_type(nn.Linear, head[1]) for head in task.layer_heads]
    for matrix in matrices:
        nn.init.normal_(matrix.weight)
    scalars = task.objective(task.probe(features), label)
    losses = [F.cross_entropy(head(features[:, k]), label) for k, head in enumerate(task.heads)]
    torch.testing.assert_close(scalars["loss"], (losses[0] + losses[1]) / 2)
    assert set(scalars) == {"loss", "loss_layer_0", "loss_layer_1"}
    ours = torch.autograd.grad(scalars["loss"], list(task.heads.parameters()))
    alone = [
        g
        for loss, matrix in zip(losses, matrices, strict=True)
        for g in torch.autograd.grad(loss, list(matrix.parameters()))
    ]
    assert len(ours) == 4 and all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


def test_layers_of_a_network_without_class_token():
    model = of_type(Classifier, probe_of("task.layer=[0,1]").model)
    drop_class_token(model)
    assert block_output(model, torch.randn(2, 3, 16, 16), 0).shape == (2, 16, 32)


# ---------------------------------------------------------------- runs


def test_several_layers_learn_what_each_learns_alone(encoder, probed, tmp_path):
    assert run_here(tmp_path / "alone", *PROBE, f"init={encoder}", "task.layer=0", "task.max_steps=3") == 0
    same_as_alone(probed, tmp_path / "alone", "0")
    results = summary(probed)
    assert list(results["layers"]) == ["null", "-1", "0"]
    best = max(results["layers"], key=lambda layer: results["layers"][layer]["top1"])
    assert {"null": None, "-1": -1, "0": 0}[best] == results["best_layer"]
    assert results["top1"] == results["layers"][best]["top1"] and results["best_top1"] == results["top1"]
    with (probed / "layers.csv").open(newline="") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == ["null", "-1", "0"]
    lines = read_json_lines(probed / "metrics.jsonl")
    assert {f"loss_layer_{layer}" for layer in ("null", "-1", "0")} <= set().union(*lines)
    assert {f"val/top1_layer_{layer}": row["top1"] for layer, row in results["layers"].items()}.items() <= lines[
        -1
    ].items()
    assert "from one pass of the encoder" in (probed / "report.html").read_text()
    assert (probed / "images" / "layers.png").stat().st_size > 5000


def test_the_last_line_names_the_layer(probed):
    results, finished = summary(probed), Summary.read(probed)
    assert finished is not None
    best = "null" if results["best_layer"] is None else results["best_layer"]
    sentence = f"top1 {results['top1']:.4f} (task.layer={best}, the best of 3 on the validation images)  "
    assert closing_lines(probed, finished).splitlines()[-1].startswith(sentence)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ATTENTIVE])
def test_cached_features_of_several_layers_give_what_each_gives_alone(encoder, tmp_path, kind):
    cached = [*PROBE, *kind, f"init={encoder}", "task.cached_features=true", "task.epochs=2", "task.warmup_epochs=0"]
    cached += ["task.learning_rates=[0.01,3]"]
    assert run_here(tmp_path / "several", *cached, LAYERS) == 0
    assert run_here(tmp_path / "alone", *cached, "task.layer=0") == 0
    same_as_alone(tmp_path / "several", tmp_path / "alone", "0")
    results = summary(tmp_path / "several")
    assert results["layers"]["0"]["best_lr"] == summary(tmp_path / "alone")["best_lr"]
    assert results["top1"] == max(row["top1"] for row in results["layers"].values())
    assert run_here(tmp_path / "again", *TINY_OTHER, "task=evaluate", f"init={tmp_path / 'several'}") == 0
    assert summary(tmp_path / "again")["top1"] == results["top1"]


def test_evaluation_mae_load_and_export_use_the_best_layer(probed, tmp_path):
    results, model = summary(probed), mae.load(probed)
    network = of_type(Classifier, model.network)
    assert network.layer == results["best_layer"]
    assert run_here(tmp_path / "v", *TINY_OTHER, "task=evaluate", f"init={probed}") == 0
    assert summary(tmp_path / "v")["top1"] == results["top1"]
    assert summary(tmp_path / "v")["loss"] == pytest.approx(results["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, None])
def test_a_checkpoint_says_which_layer_its_probe_reads(encoder, tmp_path, monkeypatch, layer):
    """Whichever validates best: here the layer whose results come from the labels."""
    number = [None, -1, 0].index(layer)
    take = LayersProbe.take_results
    monkeypatch.setattr(LayersProbe, "take_results", lambda task, results: (take(task, results), task.choose(number)))
    run = tmp_path / "run"
    assert run_here(run, *PROBE, f"init={encoder}", LAYERS, "task.max_steps=2") == 0
    assert summary(run)["best_layer"] == layer
    assert of_type(Classifier, mae.load(run).network).layer == layer
    assert of_type(Classifier, mae.load(run / "checkpoints" / "best").network).layer == layer
    more = ["task.format=safetensors", f"task.path={tmp_path / 'model.safetensors'}"]
    assert run_here(tmp_path / "x", *TINY_OTHER, "task=export", f"init={run}", *more) == 0
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loaded = mae.load(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded.logits(images), mae.load(run).logits(images))
    if layer == 0:
        message = said(*TINY_OTHER, "task=export", "task.format=timm", f"init={run}", directory=tmp_path / "timm")
        assert message.startswith("task.format=timm cannot express a probe of block 0")


def test_a_plan_counts_all_heads_and_the_deepest_layer():
    cfgs = [composed(*PROBE, "init=run", f"task.layer={layer}") for layer in ("0", "[0]", "[0,-1]", "-1")]
    models = [model_on_meta(cfg) for cfg in cfgs]
    counts = [parameters(model)[0] for model in models]
    assert counts[1] == counts[0] and counts[2] == counts[0] + 33 * 10
    flops = [operations(cfg, model)[1] for cfg, model in zip(cfgs, models, strict=True)]
    assert flops[0] == flops[1] < flops[2] == flops[3]


@pytest.mark.slow
def test_probes_that_were_stopped_end_with_the_same_bits(encoder, tmp_path):
    command = [*PROBE, *ATTENTIVE, f"init={encoder}", LAYERS, "task.max_steps=6", "task.eval_every_epochs=0.01"]
    command += ["checkpoint.every_epochs=0.01", "checkpoint.keep=9"]
    assert run_here(tmp_path / "whole", *command) == 0
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut, symlinks=True)
    for left in (cut / "summary.json", *(cut / "checkpoints").glob("step_*[4-9]")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert run_here(cut, *command) == 0 and "goes on from" in (cut / "log.txt").read_text()
    ended = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, ended[name]) for name, tensor in weights(cut).items())
    assert summary(cut)["layers"] == summary(tmp_path / "whole")["layers"]


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(encoder, tmp_path):
    command = [*PROBE, f"init={encoder}", LAYERS, "task.max_steps=4", "task.warmup_epochs=0"]
    assert run_here(tmp_path / "one", *command) == 0
    assert run_here(tmp_path / "two", *command, "launcher.processes=2") == 0
    one, two = summary(tmp_path / "one"), summary(tmp_path / "two")
    assert one["best_layer"] == two["best_layer"]
    for layer, row in one["layers"].items():
        assert two["layers"][layer]["loss"] == pytest.approx(row["loss"], rel=1e-3)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in ("head.0.running_var", "head.1.weight"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ("[0,2]", "task.layer=2 is none of the 2 blocks: -2 to 1, or null for the output of the last norm."),
        ("[]", "task.layer must name one layer or more, got []."),
        ("[1,0,-1]", "task.layer=[1,0,-1] names one layer twice (1 and -1): remove one of them."),
        ("[null,null]", "task.layer=[null,null] names one layer twice (null and null): remove one of them."),
        ("every", "task.layer must be a whole number or a list, each a whole number or null or one of all or null"),
    ],
)
def test_lists_of_layers_that_are_refused(layer, sentence):
    with pytest.raises(UserError) as caught:
        composed(*PROBE, "init=run", f"task.layer={layer}")
    assert sentence in str(caught.value)
