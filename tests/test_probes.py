"""Probes: the attentive one against a plain computation, a block by choice, and what reads their runs."""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, TINY_PRETRAIN, composed, of_type, run_here
from test_distributed import losses, on_ranks, trained
from test_evaluate import work_on
from test_tasks import TINY_OTHER, said, summary, weights
from torch import Tensor, nn

import mae
from mae.errors import UserError
from mae.launch import launch
from mae.models.probe import AttentivePool
from mae.models.vit import Classifier, classifier
from mae.runs.files import read_json_lines
from mae.tasks.linprobe import attentive_head
from mae.tools.cost import forward_flops
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained

SIZES: dict[str, int] = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=32, depth=2, num_heads=2)
PROBE = [*TINY, "task=linprobe", "task.batch_size=32", "task.probe=attentive", "task.probe_queries=4"]
PROBE += ["task.log_every_steps=1"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("encoder")
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=2") == 0
    return run


@pytest.fixture(scope="module")
def probed(encoder, tmp_path_factory) -> Path:
    """A run of an attentive probe of the first of two blocks."""
    run = tmp_path_factory.mktemp("probed") / "run"
    assert run_here(run, *PROBE, f"init={encoder}", "task.layer=-2", "task.max_steps=3", "optimizer.base_lr=1") == 0
    return run


# ---------------------------------------------------------------- the function


def plain_logits(head: nn.Sequential, tokens: Tensor, projection: bool) -> Tensor:
    """The logits as the paper writes them: image by image and query by query."""
    pool, matrix = of_type(AttentivePool, head[0]), of_type(nn.Linear, head[2])
    width, queries = tokens.shape[2], len(pool.query)
    share, rows = width // queries, []
    for x in tokens:
        values = x @ of_type(nn.Linear, pool.value).weight.T if projection else x
        slices = []
        for j in range(queries):
            attention = torch.exp(x @ pool.query[j] / math.sqrt(width))
            slices.append((attention / attention.sum()) @ values[:, j * share : (j + 1) * share])
        rows.append(torch.cat(slices))
    pooled = torch.stack(rows)
    mean, variance = pooled.mean(0), ((pooled - pooled.mean(0)) ** 2).mean(0)
    return (pooled - mean) / torch.sqrt(variance + 1e-6) @ matrix.weight.T + matrix.bias


@pytest.mark.parametrize("projection", [True, False])
def test_an_attentive_probe_is_the_paper_s_function_in_loss_and_gradients(projection):
    torch.manual_seed(0)
    head = attentive_head(12, 5, 4, projection).double()
    nn.init.normal_(of_type(AttentivePool, head[0]).query)  # attention that is far from uniform
    tokens, label = torch.randn(6, 9, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    loss = F.cross_entropy(head(tokens), label)
    plain = F.cross_entropy(plain_logits(head, tokens, projection), label)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    parameters = list(head.parameters())
    assert len(parameters) == 3 + projection
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert ours.abs().max() > 1e-6


def test_the_published_head_has_as_many_parameters():
    """Its log of MAE's ViT-B (billpsomas/efficient-probing, logs/mae_base/ep.txt) counts 1,383,400."""
    assert sum(p.numel() for p in attentive_head(768, 1000, 32, projection=True).parameters()) == 1_383_400


def test_the_table_of_the_how_to_is_that_of_its_records():
    records = json.loads((ROOT / "docs" / "probes.json").read_text())
    page, means = (ROOT / "docs" / "howto" / "probes.md").read_text(), {}
    for kind in ("linear", "attentive"):
        results = [records[f"{kind}_seed_{seed}"]["result"] for seed in range(3)]
        assert all(result["top1"] == max(result["top1_by_lr"].values()) for result in results)
        top1 = [result["top1"] for result in results]
        means[kind] = sum(top1) / 3
        rates = " ".join(f"{result['best_lr']:g}" for result in results)
        assert f"| {kind} | {' '.join(f'{value:.2f}' for value in top1)} | {means[kind]:.2f} | {rates} |" in page
    assert f"{means['attentive'] - means['linear']:.1f} points" in page


# ---------------------------------------------------------------- runs


def test_an_attentive_probe_learns_its_head_and_no_bit_of_the_encoder(encoder, probed):
    before, after = weights(encoder), weights(probed)
    new = {"head.0.query", "head.0.value.weight", "head.2.weight", "head.2.bias"}
    statistics = {f"head.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {name for name in after if name.startswith("head.")} == new | statistics
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if not name.startswith("head."))
    assert after["head.0.query"].shape == (4, 32) and int(after["head.1.num_batches_tracked"]) == 3
    seen = [row["loss"] for row in read_json_lines(probed / "metrics.jsonl") if "loss" in row]
    assert len(seen) == 3 and min(seen) < seen[0] and all(map(math.isfinite, seen))
    assert {"top1", "top5", "loss"} <= summary(probed).keys()


def test_its_checkpoint_is_evaluated_loaded_and_predicts(encoder, probed, tmp_path):
    assert run_here(tmp_path / "v", *TINY_OTHER, "task=evaluate", f"init={probed}") == 0
    assert summary(tmp_path / "v")["top1"] == summary(probed)["top1"]
    assert summary(tmp_path / "v")["loss"] == pytest.approx(summary(probed)["loss"], rel=1e-5)
    assert run_here(tmp_path / "p", *TINY_OTHER, "task=predict", f"init={probed}", "task.num_images=1") == 0
    assert sum(summary(tmp_path / "p")["predicted"].values()) == summary(tmp_path / "p")["rows"] > 0

    model, images = mae.load(probed), torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = of_type(Classifier, model.network)
    assert model.classes == [str(digit) for digit in range(10)] and (network.layer, network.reads_patches) == (-2, True)
    tokens = model.embed(images, pooling="patches", layer=0)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(images), of_type(nn.Sequential, network.head)(tokens))
    torch.testing.assert_close(model.embed(images), mae.load(encoder).embed(images))  # after the last norm, as ever


def test_exports_hold_it_or_say_that_they_cannot(probed, tmp_path):
    model, images = mae.load(probed), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    command = [*TINY_OTHER, "task=export", f"init={probed}"]
    for file_format in ("timm", "huggingface", "reference"):
        sentence = (
            f"task.format={file_format} cannot express an attentive probe: choose onnx, torch_export or safetensors, "
            "or export the encoder (init= the run that was probed)."
        )
        assert said(*command, f"task.format={file_format}", directory=tmp_path / file_format) == sentence
    more = ["task.format=safetensors", f"task.path={tmp_path / 'model.safetensors'}"]
    assert run_here(tmp_path / "x", *command, *more) == 0
    loaded = mae.load(tmp_path / "model.safetensors")
    assert "attentive probe of 10 classes (patch tokens)" in loaded.kind and loaded.classes == model.classes
    torch.testing.assert_close(loaded.logits(images), model.logits(images))


@pytest.mark.slow
def test_graphs_compute_its_logits(probed, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    for file_format, name in (("onnx", "model.onnx"), ("torch_export", "model.pt2")):
        more = [f"task.format={file_format}", f"task.path={tmp_path / file_format / name}"]
        assert run_here(tmp_path / f"run_{file_format}", *TINY_OTHER, "task=export", f"init={probed}", *more) == 0
    session = runtime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    program = torch.export.load(tmp_path / "torch_export" / "model.pt2").module()
    model = mae.load(probed)
    for count in (1, 3):
        images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        logits = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
        torch.testing.assert_close(logits, model.logits(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(program(images), model.logits(images), rtol=1e-5, atol=1e-5)


def test_a_classifier_that_reads_other_tokens_starts_a_new_head_and_says_why(probed):
    model = classifier(**SIZES, mlp_ratio=4.0, num_classes=10, drop_path=0.0, global_pool="token")
    report = str(load_pretrained(model, read_pretrained(str(probed))))
    assert "The head starts afresh: its classifier is an attentive probe, unlike the model's." in report
    assert "head.*" in report.partition("; as initialised: ")[2]


def test_a_linear_probe_reads_the_block_that_is_asked_for(encoder, tmp_path):
    run = tmp_path / "first"
    linear = [
        *TINY,
        "task=linprobe",
        "task.batch_size=32",
        f"init={encoder}",
        "task.max_steps=2",
        "optimizer.base_lr=1",
    ]
    assert run_here(run, *linear, "task.layer=0") == 0
    model, images = mae.load(run), torch.randn(4, 3, 16, 16)
    head = of_type(nn.Sequential, model.network.head)
    with torch.no_grad():
        features = model.embed(images, pooling="token", layer=0)
        torch.testing.assert_close(model.logits(images), head(features))
        assert not torch.allclose(model.logits(images), head(model.embed(images, pooling="token")))
    message = said(*TINY_OTHER, "task=export", "task.format=timm", f"init={run}", directory=tmp_path / "x")
    assert message.startswith("task.format=timm cannot express a probe of block 0: choose onnx")
    whole = classifier(**SIZES, mlp_ratio=4.0, num_classes=10, drop_path=0.0, global_pool="token")
    report = str(load_pretrained(whole, read_pretrained(str(run))))
    assert "its classifier reads the output of block 0, the model's of the last norm." in report


def test_cached_tokens_train_a_probe_for_each_rate_and_say_their_memory(encoder, tmp_path):
    command = [*PROBE, f"init={encoder}", "task.cached_features=true", "task.epochs=2", "task.warmup_epochs=0"]
    assert run_here(tmp_path / "two", *command, "task.learning_rates=[0.001,30]") == 0
    log = (tmp_path / "two" / "log.txt").read_text()
    images = int(re.findall(r"the tokens of (\d+) images take", log)[0])
    assert f"take {images * 16 * 32 * 4 / 2**30:.2f} GiB of each rank's memory" in log  # 16 patches of 32 float32
    two = summary(tmp_path / "two")
    assert set(two["top1_by_lr"]) == {"0.001", "30"} and two["top1"] == max(two["top1_by_lr"].values())
    alone = [*command, f"task.learning_rates=[{two['best_lr']:g}]"]
    assert run_here(tmp_path / "one", *alone) == 0
    assert summary(tmp_path / "one")["top1"] == two["top1"]  # probes do not disturb each other
    assert run_here(tmp_path / "again", *TINY_OTHER, "task=evaluate", f"init={tmp_path / 'two'}") == 0
    assert summary(tmp_path / "again")["top1"] == two["top1"]


@pytest.mark.slow
def test_an_attentive_probe_that_was_stopped_ends_with_the_same_bits(encoder, tmp_path):
    command = [*PROBE, f"init={encoder}", "task.max_steps=6", "checkpoint.every_epochs=0.01", "checkpoint.keep=9"]
    assert run_here(tmp_path / "whole", *command) == 0
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut, symlinks=True)
    for left in (cut / "summary.json", *(cut / "checkpoints").glob("step_*[4-9]")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert run_here(cut, *command) == 0 and "goes on from" in (cut / "log.txt").read_text()
    ended = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, ended[name]) for name, tensor in weights(cut).items())
    assert summary(cut)["loss"] == summary(tmp_path / "whole")["loss"]


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(encoder, tmp_path):
    """The statistics before its matrix are those of all ranks, in the gradient of the queries too."""
    command = [*PROBE, f"init={encoder}", "task.max_steps=6", "task.warmup_epochs=0", "optimizer.base_lr=5"]
    assert run_here(tmp_path / "one" / "run", *command) == 0
    results = on_ranks(2, tmp_path / "two", functools.partial(trained, overrides=command))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    one, two = (weights(tmp_path / name / "run") for name in ("one", "two"))
    for name in ("head.0.query", "head.0.value.weight", "head.1.running_var", "head.2.weight"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    assert results[0]["digest"] == results[1]["digest"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            "task.layer=2",
            "task.layer=2 is none of the 2 blocks: -2 to 1, or null for the output of the last norm.",
        ),
        (
            "task.probe=attentive task.probe_queries=12",
            "task.probe_queries=12 does not divide model.embed_dim=32, of which each query pools its share: the "
            "nearest that do: 8 or 16.",
        ),
        (
            "task.probe=attentive task.probe_queries=33",
            "task.probe_queries=33 does not divide model.embed_dim=32, of which each query pools its share: the "
            "nearest that do: 32.",
        ),
        (
            "task.probe=attentive task.global_pool=avg",
            "task.global_pool=avg is for task.probe=linear, and an attentive probe pools by its queries: set "
            "task.global_pool=token.",
        ),
    ],
)
def test_what_a_probe_cannot_read_is_refused(overrides, sentence):
    with pytest.raises(UserError) as caught:
        composed(*TINY, "task=linprobe", "task.batch_size=32", "init=run", *overrides.split())
    assert sentence in str(caught.value)


def test_a_plan_counts_the_blocks_that_are_run():
    with torch.device("meta"):
        model = classifier(**SIZES, mlp_ratio=4.0, num_classes=5, drop_path=0.0, global_pool="token")
    whole = forward_flops(model, None).total
    model.layer = 0
    embedding = 2 * 16 * 48 * 32  # 16 patches of 48 values
    assert (forward_flops(model, None).total - embedding) * 2 == whole - embedding


def test_cached_probes_on_two_ranks_are_those_of_one(encoder, tmp_path):
    command = [*TINY, "task=linprobe", "task.batch_size=32", "task.max_steps=3", f"init={encoder}"]
    heads = []
    for world in (1, 2):
        run = tmp_path / str(world)
        chosen = [*command, "task.cached_features=true", f"output_dir={run}"]
        launch.prepare(composed(*chosen), chosen)
        work_on(world, run)
        heads.append(weights(run))
    for name in ("head.0.running_mean", "head.0.running_var", "head.1.weight"):
        torch.testing.assert_close(heads[0][name], heads[1][name], rtol=1e-5, atol=1e-7)
