"""Continued pre-training from weights of other channels, patches and sizes of image: exact values, and runs."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_PRETRAIN, run_here
from test_export import UNLABELLED, autoencoder, same
from timm.models._manipulate import adapt_input_conv

from mae.errors import UserError
from mae.weights.adapt import FIRST, Adaptation, adapted, groups_of, inflated
from mae.weights.export import export
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained
from mae.weights.sizes import sizes_of_model

BOTH = Adaptation("mean", "resize")


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def file(tmp_path) -> str:
    """An autoencoder of 4 x 6 patches of 4 x 4 pixels and three channels, with its decoder."""
    return str(export(autoencoder(img_size=[16, 24]), format="safetensors", path=str(tmp_path), facts=UNLABELLED)[0])


@pytest.mark.parametrize("channels", ["mean", [[0], [1], [2], [0, 1, 2], [1]], [[2, 1], [0], [], [], [0]]])
def test_an_image_of_equal_channels_gives_the_same_tokens(weight, channels):
    grey = torch.randn(2, 1, 8, 8)
    new = inflated(weight, groups_of(channels, 3, 5))
    same(
        F.conv2d(grey.expand(-1, 5, -1, -1), new, stride=4),
        F.conv2d(grey.expand(-1, 3, -1, -1), weight, stride=4),
        1e-5,
    )


def test_channels_of_groups_have_their_shares_and_an_empty_group_changes_nothing(weight):
    new = inflated(weight, [[0], [1], [0, 2]])
    same(new, torch.stack([weight[:, 0] / 2, weight[:, 1], weight[:, 0] / 2 + weight[:, 2]], 1))
    images = torch.randn(2, 4, 8, 8)
    extended = inflated(weight, [[0], [1], [2], []])
    same(F.conv2d(images, extended, stride=4), F.conv2d(images[:, :3], weight, stride=4), 1e-5)
    assert torch.equal(inflated(weight, [[2], [1], [0]]), weight.flip(1))
    same(inflated(weight, groups_of("mean", 3, 1)), adapt_input_conv(1, weight))  # timm's, for one channel


def test_a_resized_first_layer_gives_the_same_for_a_resized_patch(file):
    """FlexiViT, equation 3: the product with any patch is kept when both are enlarged."""
    pretrained = read_pretrained(file)
    model = autoencoder(img_size=[32, 48], patch_size=8)
    new = adapted(pretrained, sizes_of_model(model), BOTH).state[FIRST]
    patch = torch.randn(5, 3, 4, 4)
    enlarged = F.interpolate(patch, size=(8, 8), mode="bicubic", antialias=True)
    same(F.conv2d(enlarged, new), F.conv2d(patch, pretrained.state[FIRST]), 1e-4)
    constant = torch.ones(1, 3, 4, 4)
    same(F.conv2d(torch.ones(1, 3, 8, 8), new), F.conv2d(constant, pretrained.state[FIRST]), 1e-4)


@torch.no_grad()
def test_a_grey_image_has_the_same_tokens_in_a_model_of_other_channels_and_patches(file):
    """4 x 6 patches before and after, so that positions stay: no square, so the file must have said its grid."""
    model = autoencoder(img_size=[32, 48], patch_size=8, in_chans=5)
    report = load_pretrained(model, read_pretrained(file), adaptation=BOTH)
    before = autoencoder(img_size=[16, 24])
    same(
        model.forward_features(torch.full((1, 5, 32, 48), 0.7)),
        before.forward_features(torch.full((1, 3, 16, 24), 0.7)),
        1e-4,
    )
    text = str(report)
    for note in (
        "Its first layer for 3 channels was taken for 5, each from the mean of all of its own (task.init_channels).",
        "was resized from patches of 4 x 4 to 8 x 8 pixels by the pseudo-inverse (task.init_patch_size).",
        "A decoder of its first layer's own patches is not taken: ours starts afresh.",
    ):
        assert note in text
    assert "interpolated" not in text


def test_nothing_changes_where_sizes_are_equal_or_nothing_is_allowed(file):
    pretrained, sizes = read_pretrained(file), sizes_of_model(autoencoder(img_size=[16, 24]))
    assert adapted(pretrained, sizes, BOTH) is pretrained and adapted(pretrained, sizes, Adaptation()) is pretrained
    model = autoencoder(img_size=[24, 16])
    report = load_pretrained(model, pretrained, adaptation=Adaptation())
    assert "Its pos_embed was interpolated from 4 x 6 to 6 x 4 patches." in str(report) and not report.fresh


def test_other_sizes_are_refused_with_the_keys_that_take_them(file):
    pretrained = read_pretrained(file)
    with pytest.raises(UserError, match=r"set task\.init_patch_size=resize task\.init_channels=mean: its first layer"):
        load_pretrained(autoencoder(patch_size=8, in_chans=4), pretrained, adaptation=Adaptation())
    with pytest.raises(UserError, match=r"with embed_dim 24, but .*, or name another checkpoint\.$"):
        load_pretrained(autoencoder(embed_dim=48), pretrained, adaptation=BOTH)
    with pytest.raises(UserError, match=r"task\.init_channels has 2 groups, and the model 4 channels"):
        load_pretrained(autoencoder(in_chans=4), pretrained, adaptation=Adaptation([[0], [1]]))
    with pytest.raises(UserError, match=r"names channel 3, and the first layer of init= has channels 0 to 2"):
        load_pretrained(autoencoder(in_chans=2), pretrained, adaptation=Adaptation([[0], [3]]))


def test_pre_training_goes_on_from_a_run_with_other_channels_patches_and_images(tmp_path):
    assert run_here(tmp_path / "first", *TINY_PRETRAIN, "task.max_steps=1") == 0
    more = ["data.in_chans=1", "data.mean=[0.5]", "data.std=[0.25]", "data.img_size=24", "model.patch_size=6"]
    command = [*TINY_PRETRAIN, "task.max_steps=2", *more, f"init={tmp_path / 'first'}"]
    with pytest.raises(UserError, match=r"set task\.init_patch_size=resize task\.init_channels=mean"):
        run_here(tmp_path / "refused", *command, "launcher=inline")
    command += ["task.init_channels=mean", "task.init_patch_size=resize"]
    assert run_here(tmp_path / "second", *command) == 0
    log = (tmp_path / "second" / "log.txt").read_text()
    assert "for 3 channels was taken for 1" in log and "ours starts afresh" in log
    third = [*command[:-2], "task.max_steps=1"]
    assert run_here(tmp_path / "third", *[word.replace("/first", "/second") for word in third]) == 0
    assert "tensors loaded" in (tmp_path / "third" / "log.txt").read_text()
