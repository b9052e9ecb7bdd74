"""Decoders: against plain forwards in float64, what they predict, what they cost, and which keys contradict them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, composed

from mae.models.layers import set_attention_kernel, set_checkpointing
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import count_predicted
from mae.tools.cost import forward_flops

MODEL: dict[str, Any] = dict(
    img_size=[16, 24], patch_size=[4, 8], in_chans=3, embed_dim=32, depth=3, num_heads=4, mlp_ratio=4.0,
    decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, norm_pix_loss=True,
)  # fmt: skip
KINDS = [("self", "decoder"), ("self", "encoder"), ("cross", "decoder"), ("linear", "encoder")]


def autoencoder(decoder, mask_tokens: Any = "decoder", **changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = MaskedAutoencoder(**{**MODEL, **changes}, decoder=decoder, mask_tokens=mask_tokens).double()
    for parameter in model.parameters():  # so that norms and biases matter
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(model, count=3):
    images = torch.randn(count, 3, *model.img_size, dtype=torch.float64)
    return images, torch.rand(count, model.num_patches, dtype=torch.float64)


# ---------------------------------------------------------------- the methods in the obvious way


def plain_attention(q, k, v, heads):
    """Softmax attention of (B, M, W) over (B, N, W)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def plain_mlp(block, x):
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def plain_block(block, x):
    x = x + block.attn.proj(plain_attention(*block.attn.qkv(block.norm1(x)).chunk(3, -1), block.attn.num_heads))
    return plain_mlp(block, x)


def plain_target(model, images):
    (height, width), (down, across) = model.grid_size, model.patch_size
    x = images.unflatten(2, (height, down)).unflatten(4, (width, across)).permute(0, 2, 4, 3, 5, 1)
    target = x.flatten(3).flatten(1, 2)  # (B, L, rows x columns x channels)
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()


def plain_embedding(model, images):
    """Tokens (B, L, D) of all patches, with their positions."""
    return model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]


def plain_cross_loss(model, images, noise, mask_ratio, predict_ratio):
    """CrossMAE's method, arXiv 2401.14391: patches stay in the image's order, a mask chooses the predicted ones."""
    length, index = model.num_patches, torch.arange(len(images))[:, None]
    visible = int(length * (1 - mask_ratio))
    left_out = int(length * (mask_ratio - (predict_ratio or mask_ratio)))
    order = noise.argsort(1)
    x = plain_embedding(model, images)[index, order[:, :visible]]
    states = [torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)]
    for block in model.blocks:
        states.append(plain_block(block, states[-1]))
    mixtures = torch.stack(states, -1) @ model.wfm.linear.weight.T
    mask = torch.zeros_like(noise).scatter(1, order[:, visible + left_out :], 1.0).bool()
    x = torch.stack([model.mask_token[0] + model.decoder_pos_embed[0, 1:][row] for row in mask])
    for number, block in enumerate(model.decoder_blocks):
        attn = block.cross_attn
        k, v = attn.kv(model.dec_norms[number](mixtures[..., number])).chunk(2, -1)
        x = x + attn.proj(plain_attention(attn.q(block.norm1(x)), k, v, block.num_heads))
        x = plain_mlp(block, x)
    pred = model.decoder_pred(model.decoder_norm(x))
    target = torch.stack([rows[row] for rows, row in zip(plain_target(model, images), mask, strict=True)])
    return ((pred - target) ** 2).mean()


def plain_encoder_loss(model, images, noise, mask_ratio, predict_ratio):
    """Mask tokens in the encoder (paper, table 1c): a masked patch's embedding is replaced, nothing is left out."""
    visible = int(model.num_patches * (1 - mask_ratio))
    mask = torch.ones_like(noise).scatter(1, noise.argsort(1)[:, :visible], 0.0)
    hidden = model.mask_token + model.pos_embed[:, 1:]
    x = torch.where(mask[..., None].bool(), hidden, plain_embedding(model, images))
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
    for block in model.blocks:
        x = plain_block(block, x)
    x = model.norm(x)
    if model.decoder_name == "self":
        x = model.decoder_embed(x) + model.decoder_pos_embed
        for block in model.decoder_blocks:
            x = plain_block(block, x)
        x = model.decoder_norm(x)
    pred = model.decoder_pred(x)[:, 1:]
    return (((pred - plain_target(model, images)) ** 2).mean(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("checkpointing", ["none", "light", "blocks"])
@pytest.mark.parametrize("kernel", ["plain", "fused"])
@pytest.mark.parametrize(
    ("decoder", "mask_tokens", "plain", "predict_ratio"),
    [
        ("cross", "decoder", plain_cross_loss, None),
        ("cross", "decoder", plain_cross_loss, 0.25),
        ("self", "encoder", plain_encoder_loss, None),
        ("linear", "encoder", plain_encoder_loss, None),
    ],
)
def test_loss_and_gradients_are_those_of_a_plain_forward(
    decoder, mask_tokens, plain, predict_ratio, kernel, checkpointing
):
    model = autoencoder(decoder, mask_tokens)
    set_attention_kernel(model, kernel)
    set_checkpointing(model, checkpointing)
    images, noise = batch(model)
    params = [p for p in model.parameters() if p.requires_grad]
    ours = model(images, 0.6, noise, predict_ratio).loss
    expected = plain(model, images, noise, 0.6, predict_ratio)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours, params), torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


# ---------------------------------------------------------------- what is predicted


@pytest.mark.parametrize(
    ("patches", "mask_ratio", "predict_ratio", "count"),
    [(196, 0.75, None, 147), (196, 0.75, 0.75, 147), (196, 0.75, 0.25, 49), (784, 0.75, 0.25, 196), (12, 0.6, 0.5, 7)],
)
def test_the_number_of_predicted_patches_is_the_published_codes(patches, mask_ratio, predict_ratio, count):
    assert count_predicted(patches, mask_ratio, predict_ratio) == count
    visible, left_out = int(patches * (1 - mask_ratio)), int(patches * (mask_ratio - (predict_ratio or mask_ratio)))
    assert count == patches - visible - left_out


def test_a_share_of_the_patches_is_those_of_largest_noise():
    model = autoencoder("cross")
    images, noise = batch(model)
    pred, mask = model.predict(images, 0.6, noise)
    error = ((pred - model.target(images, model.patchify(images))) ** 2).mean(-1)
    largest = torch.zeros_like(mask).scatter(1, noise.argsort(1)[:, -6:], 1.0)  # 2 of 8 masked ones are left out
    expected = (error * largest).sum() / largest.sum()
    torch.testing.assert_close(model(images, 0.6, noise, predict_ratio=0.4).loss, expected)


@pytest.mark.parametrize(("decoder", "mask_tokens"), KINDS)
def test_a_picture_has_the_training_steps_prediction_of_every_masked_patch(decoder, mask_tokens):
    model = autoencoder(decoder, mask_tokens)
    images, noise = batch(model)
    pred, mask = model.predict(images, 0.6, noise)
    by_pictures = ((pred - model.target(images, model.patchify(images))) ** 2).mean(-1)[mask == 1].mean()
    loss, same_mask = model(images, 0.6, noise)
    torch.testing.assert_close(by_pictures, loss, rtol=1e-12, atol=0)
    assert torch.equal(mask, same_mask)


@pytest.mark.parametrize(("decoder", "mask_tokens"), KINDS)
def test_every_parameter_is_trained(decoder, mask_tokens):
    model = autoencoder(decoder, mask_tokens)
    images, noise = batch(model)
    model(images, 0.75, noise).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    encoder = {name for name in model.state_dict() if name not in model.decoder_keys()}
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    names |= set() if decoder == "cross" else {"norm.weight", "norm.bias"}
    assert {name for name in encoder if not name.startswith("blocks.")} == names


# ---------------------------------------------------------------- operations


@pytest.mark.slow
def test_mask_tokens_in_the_encoder_take_the_papers_operations():
    sizes: dict[str, Any] = dict(img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
    sizes |= dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
    with torch.device("meta"):
        ours, theirs = (autoencoder("self", mask_tokens, **sizes) for mask_tokens in ("decoder", "encoder"))
    ratio = forward_flops(theirs, 0.75).total / forward_flops(ours, 0.75).total
    assert ratio == pytest.approx(3.3, abs=0.1)  # table 1c, ViT-L


@pytest.mark.parametrize(("predict_ratio", "queries"), [(None, 9), (0.25, 3)])
def test_operations_of_a_cross_decoder_are_its_products(predict_ratio, queries):
    flops = forward_flops(autoencoder("cross").to("meta"), 0.75, predict_ratio)
    keys, width, wide, values = 4, 16, 32, 96
    block = queries * width * (2 * width + 8 * width) + keys * wide * 2 * width + 2 * queries * keys * width
    mixing = 2 * 4 * keys * wide
    assert flops.decoder == 2 * (2 * block + mixing + queries * width * values)
    assert flops.encoder == forward_flops(autoencoder("self").to("meta"), 0.75).encoder


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.decoder=crss"], "model.decoder=crss is none of self, cross, linear. Did you mean cross?"),
        (
            ["model.decoder=linear"],
            "model.decoder=linear predicts from the encoder's tokens, of which masked patches have none: set "
            "model.mask_tokens=encoder.",
        ),
        (
            ["model.decoder=cross", "model.mask_tokens=encoder"],
            "model.mask_tokens=encoder puts masked patches among the tokens that model.decoder=cross attends to: set "
            "model.mask_tokens=decoder.",
        ),
        (
            ["task.predict_ratio=0.25"],
            "task.predict_ratio=0.25 leaves masked patches out, which model.decoder=self needs for those that it "
            "predicts: set task.predict_ratio=null, or model.decoder=cross.",
        ),
        (
            ["model.decoder=cross", "task.predict_ratio=0.8"],
            "task.predict_ratio=0.8 is above task.mask_ratio=0.75: more patches than are masked.",
        ),
        (
            ["model.decoder=cross", "task.mask_ratio=[]", "task.predict_ratio=0.25"],
            "task.mask_ratio must be a number or [low, high] with low < high, got [].",
        ),
        (["model.decoder=cross", "task.predict_ratio=0"], "task.predict_ratio must lie in (0, 1), got 0.0."),
        (["model.mask_tokens=both"], "model.mask_tokens must be one of decoder, encoder"),
    ],
)
def test_keys_that_contradict_each_other_are_named(overrides, sentence):
    with pytest.raises(ValueError) as error:
        composed(*TINY, *overrides)
    assert sentence in str(error.value)
