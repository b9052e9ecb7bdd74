"""Which checkpoints load: each gives its own library's numbers, or is refused by the name of what differs."""

import json
import re
import shutil
from typing import Any, TypeVar

import pytest
import safetensors.torch
import timm
import torch
from timm.models import VisionTransformer, save_for_hf
from timm.models._hub import save_config_for_hf
from torch import nn

from mae.models.mae import MaskedAutoencoder
from mae.models.vit import classifier
from mae.tasks.export import restore_eps
from mae.weights import files, huggingface
from mae.weights.load import load_pretrained
from mae.weights.networks import ASSUMED
from mae.weights.read import read_pretrained

Network = TypeVar("Network", bound=nn.Module)
ANOTHER = "computes another function|is another kind of network|cannot be taken|cannot be evaluated|holds no vision tr"
NETWORK: dict[str, Any] = dict(depth=2, embed_dim=24, num_heads=3, img_size=32, patch_size=8)
PLAIN = (  # architectures of timm that load
    "deit3_base_patch16_224",
    "deit_small_patch16_224",
    "flexivit_small",
    "test_vit",
    "vit_base_patch14_dinov2",
    "vit_base_patch16_224_miil",
    "vit_base_patch32_plus_256",
    "vit_small_patch16_36x1_224",
    "vit_tiny_patch16_224",
)
OTHER = (
    "aimv2_large_patch14_224",
    "beit_base_patch16_224",
    "beit3_base_patch16_224",
    "cait_xxs24_224",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "levit_128s",
    "naflexvit_base_patch16_gap",
    "pvt_v2_b0",
    "swin_s3_tiny_224",
    "test_vit2",
    "vit_base_patch14_reg4_dinov2",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_base_patch16_gap_224",
    "vit_relpos_small_patch16_224",
    "vit_relpos_small_patch16_rpn_224",
    "vit_small_patch16_18x2_224",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_dinov3",
    "vit_tiny_r_s16_p8_224",
    "xcit_nano_12_p16_224",
)
SMALLER: tuple[dict[str, Any], ...] = ({"depth": 2, "embed_dim": 64, "num_heads": 2}, {"depth": 2}, {})
MODULES = (  # of timm.models, all that hold networks of attention
    *("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam"),
    *("eva", "deit", "beit", "naflexvit", "deepseek_vit", "qwen3_vit", "gemma4_vit", "cait", "xcit", "convit", "hiera"),
    *("mvitv2", "pvt_v2", "twins", "volo", "vitamin", "tnt", "swin_transformer", "swin_transformer_v2"),
    *("swin_transformer_v2_cr", "pit", "nest", "levit", "crossvit", "coat", "davit", "maxxvit", "hieradet_sam2"),
    *("gcvit", "nextvit", "tiny_vit", "visformer", "mlp_mixer", "focalnet"),
)


def scramble(model: Network, seed: int = 0) -> Network:
    """Random numbers of a size that shows every layer in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * max(p[0].numel(), 1) ** -0.5)
            else:
                p.copy_(0.2 * noise + name.endswith(("weight", "gamma", "gamma_1", "gamma_2")))
    return model.eval()


def build(name: str):
    """A timm architecture as small as its constructor allows, and the arguments that made it so.

    What is no VisionTransformer comes without memory for its weights: some cannot be made small.
    """
    for arguments in SMALLER:
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=5, **arguments)
        except (TypeError, ValueError, AssertionError):
            continue
        plain = type(model) is VisionTransformer
        return scramble(timm.create_model(name, num_classes=5, **arguments)) if plain else model, arguments
    raise AssertionError(name)


def save(model: nn.Module, folder, arguments) -> None:
    """Writes timm's folder, and the same tensors alone in `bare/`. Tensors without memory become zeros."""
    state = {
        key: torch.zeros(()).to(tensor.dtype).expand(tensor.shape) if tensor.is_meta else tensor
        for key, tensor in model.state_dict().items()
    }
    save_config_for_hf(model, folder / "config.json", model_args=arguments)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "bare").mkdir()
    torch.save(state, folder / "bare" / "bare.pth")


def logits(path, x: torch.Tensor, heads: int):
    """What we compute from a file as it stands, and the report."""
    file = read_pretrained(str(path))
    known: dict[str, Any] = {**file.sizes}
    sizes = {key: known[key] for key in ("patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio")}
    pool = file.head.pool if file.head else "token"
    assert pool != "patches"
    model = classifier(
        **sizes, img_size=list(x.shape[2:]), num_heads=heads, num_classes=5, drop_path=0, global_pool=pool
    )
    report = load_pretrained(model, file, head="require")
    with torch.no_grad():
        return model.eval()(x), str(report)


def loads(path, model, heads: int, size) -> bool:
    """Whether a file loads and gives the model's own numbers; False where it is refused in words.

    A bare file may give other numbers if the report says what was assumed.
    """
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    try:
        ours, report = logits(path, x, heads)
    except ValueError as error:
        if "does not divide" in str(error):
            return False
        assert any(words in str(error) for words in ANOTHER.split("|")), error
        return False
    if ASSUMED not in report:
        with torch.no_grad():
            theirs = getattr(output := model(x), "logits", output)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return True


def both_load(folder, name: str) -> bool:
    """Whether an architecture loads as timm's folder; its bare tensors are tried as well."""
    model, arguments = build(name)
    save(model, folder, arguments)
    attention = getattr(getattr(model, "blocks", [None])[0], "attn", None)
    heads, size = getattr(attention, "num_heads", 2), getattr(getattr(model, "patch_embed", None), "img_size", None)
    if not size:
        settings: Any = model.pretrained_cfg
        size = settings["input_size"][1:]
    loads(folder / "bare" / "bare.pth", model, heads, size)
    return loads(folder, model, heads, size)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_vision_transformer_of_timm_gives_its_own_logits(tmp_path, name):
    assert both_load(tmp_path, name)


@pytest.mark.parametrize("name", OTHER)
def test_another_network_of_timm_is_refused_by_name(tmp_path, name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    assert not both_load(tmp_path, name)
    with pytest.raises(ValueError, match=name):
        logits(tmp_path, torch.zeros(1, 3, 32, 32), 2)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_every_transformer_of_timm_gives_its_own_logits_or_is_refused(tmp_path, module):
    for name in timm.list_models(module=module):
        (folder := tmp_path / name).mkdir()
        both_load(folder, name)
        shutil.rmtree(folder)


# ---------------------------------------------------------------- arguments of timm's VisionTransformer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ""),
        ({"act_layer": "gelu"}, ""),
        ({"act_layer": "gelu_tanh"}, r"blocks\.0\.mlp\.act is GELUTanh, ours is GELU"),
        ({"act_layer": "quick_gelu"}, "act is QuickGELU, ours is GELU"),
        ({"act_layer": "relu"}, "act is ReLU, ours is GELU"),
        ({"act_layer": "silu"}, "act is SiLU, ours is GELU"),
        ({"norm_layer": "layernorm"}, ""),
        ({"norm_layer": "rmsnorm"}, "norms have no bias, as RMSNorm"),
        ({"qk_norm": True}, "normalises queries and keys"),
        ({"scale_attn_norm": True}, "norms inside its layers"),
        ({"scale_mlp_norm": True}, "norms inside its layers"),
        ({"attn_layer": "diff"}, "attn is DiffAttention, ours is Attention|attn"),
        ({"proj_bias": False}, "linear layers have no bias"),
        ({"qkv_bias": False, "init_values": 0.1}, ""),
        ({"pre_norm": True}, "norm before its blocks, as CLIP's"),
        ({"final_norm": False}, "no norm after its blocks"),
        ({"fc_norm": True}, "reads the class token after fc_norm"),
        ({"pos_embed": "none"}, "no (table of )?position embedding"),
        ({"no_embed_class": True}, ""),
        ({"dynamic_img_size": True}, ""),
        ({"reg_tokens": 4}, "register tokens"),
        ({"global_pool": "avg"}, ""),
        ({"global_pool": "avg", "fc_norm": False}, "mean of tokens after their norm"),
        ({"global_pool": "avg", "class_token": False}, ""),
        ({"global_pool": "avg", "pool_include_prefix": True}, "mean of all tokens, the class token among them"),
        ({"global_pool": "max"}, "pools its tokens in another way .global_pool=max"),
        ({"global_pool": "avgmax"}, "pools its tokens in another way .global_pool=avgmax"),
        ({"global_pool": "map"}, "pools by attention"),
        ({"global_pool": "prr"}, r"attn_pool \(AttentionPoolPrr\) is a layer that ours lacks"),
    ],
)
def test_each_argument_of_timms_vision_transformer(tmp_path, arguments, words):
    arguments = NETWORK | arguments
    model = scramble(timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments))
    save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    assert loads(tmp_path, model, 3, (32, 32)) == (not words)
    if words:
        with pytest.raises(ValueError, match=words):
            logits(tmp_path, torch.zeros(1, 3, 32, 32), 3)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    (tmp_path / "config.json").unlink()
    loads(tmp_path / "bare.pth", model, 3, (32, 32))


def test_norms_with_another_eps_are_refused(tmp_path, monkeypatch):
    model = scramble(timm.create_model("vit_tiny_patch16_224", num_classes=5, norm_layer=nn.LayerNorm, **NETWORK))
    monkeypatch.setattr(files.timm, "create_model", lambda name, pretrained: model)
    with pytest.raises(ValueError, match=r"timm:vit_tiny_patch16_224 .*blocks\.0\.norm1 has eps 1e-05, ours has 1e-06"):
        read_pretrained("timm:vit_tiny_patch16_224")


def test_a_model_of_timms_collection_is_looked_at(monkeypatch):
    for name, words in (("vit_small_patch16_rope_ape_224", "rotary|Eva"), ("vit_base_patch16_rpn_224", "ResPostBlock")):
        model = timm.create_model(name, num_classes=5, depth=1)
        with monkeypatch.context() as patch:
            patch.setattr(files.timm, "create_model", lambda name, pretrained, model=model: model)
            with pytest.raises(ValueError, match=words):
                read_pretrained(f"timm:{name}")


def test_the_number_of_heads_comes_from_the_architecture(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=1)
    save_for_hf(model, tmp_path, model_args={"depth": 1}, safe_serialization=True)
    with pytest.raises(ValueError, match=r"Set model\.num_heads=3"):
        logits(tmp_path, torch.zeros(1, 3, 224, 224), 6)


def test_a_config_that_lacks_arguments_is_said(tmp_path):
    model = scramble(timm.create_model("vit_tiny_patch16_224", num_classes=5, **NETWORK))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}))
    report = logits(tmp_path, torch.zeros(1, 3, 32, 32), 3)[1]
    assert "config.json describes a vit_tiny_patch16_224 of other tensors. Assumed are exact GELU" in report


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architecture": "prithvi_eo_v9"}, "names the architecture prithvi_eo_v9, which timm .* does not have"),
        ({"architecture": "resnet18"}, "names timm's resnet18, which is not timm's plain VisionTransformer"),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"no_such": 1}},
            "hold no_such, which is not known here",
        ),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "x"}}, "hold checkpoint_path"),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"act_layer": "none_such"}},
            "cannot build .*none_such",
        ),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 0}}, "cannot build"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": [1]}, "not names with values"),
    ],
)
def test_a_config_that_timm_cannot_build(tmp_path, config, words):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **NETWORK)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        read_pretrained(str(tmp_path))


def test_reading_a_folder_draws_no_random_numbers(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **NETWORK)
    save_for_hf(model, tmp_path, model_args=NETWORK, safe_serialization=True)
    before = torch.get_rng_state()
    read_pretrained(str(tmp_path))
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- bare tensors


def plain_state() -> dict[str, torch.Tensor]:
    return dict(scramble(timm.create_model("vit_tiny_patch16_224", num_classes=5, **NETWORK)).state_dict())


def refusal(path, state) -> str:
    torch.save(state, path)
    with pytest.raises(ValueError) as error:
        read_pretrained(str(path))
    assert "incomplete" not in str(error.value)
    return str(error.value)


def test_block_chunks_of_dinov2_are_numbered_through(tmp_path):
    state = plain_state()
    torch.save(state, tmp_path / "plain.pth")
    chunked = {name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): tensor
               for name, tensor in state.items()}  # fmt: skip
    torch.save(chunked | {"mask_token": torch.zeros(1, 24)}, tmp_path / "chunked.pth")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(tmp_path / "plain.pth", x, 3)[0], logits(tmp_path / "chunked.pth", x, 3)[0])
    anew = {name.replace("blocks.1.", "blocks.1.0."): tensor for name, tensor in chunked.items()}
    anew = {name.replace("blocks.1.0.1.", "blocks.1.0."): tensor for name, tensor in anew.items()}
    assert "number them anew" in refusal(tmp_path / "anew.pth", anew)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"dist_token": (1, 1, 24)}, "distilled DeiT"),
        ({"reg_token": (1, 4, 24)}, "register tokens"),
        ({"storage_tokens": (1, 4, 24)}, "DINOv3"),
        ({"norm_pre.weight": (24,)}, "as CLIP's"),
        ({"attn_pool.latent": (1, 1, 24)}, "pools by attention"),
        ({"rope.periods": (4,)}, "rotary positions"),
        ({"blocks.0.mlp.w12.weight": (24, 24)}, "SwiGLU"),
        ({"blocks.0.attn.q_norm.weight": (8,)}, "normalises queries and keys"),
        ({"blocks.0.attn.rel_pos_h": (7, 8)}, "relative positions"),
        ({"blocks.0.attn.q_bias": (24,), "blocks.0.attn.v_bias": (24,)}, "BEiT or EVA"),
        ({"patch_embed.proj.weight": (24, 3, 1, 8, 8)}, "Prithvi and VideoMAE: .* patches of 1 x 8 x 8"),
        ({"pos_embed": (1, 4, 4, 24)}, "map, as SAM's"),
        ({"blocks.0.mlp.fc1.weight": (192, 24)}, "SwiGLU"),
        ({"blocks.0.proj.weight": (24, 24)}, r"no block here has blocks\.0\.proj\.weight"),
        ({"blocks.0.attns.0.norm.weight": (24,)}, "parallel layers"),
    ],
)
def test_bare_tensors_of_another_network_are_named(tmp_path, extra, words):
    state = plain_state() | {name: torch.zeros(shape) for name, shape in extra.items()}
    message = refusal(tmp_path / "bare.pth", state)
    assert "bare.pth is another kind of network than is computed here: " in message
    assert re.search(words, message), message


def test_bare_tensors_without_norm_biases_or_positions_are_named(tmp_path):
    state = {name: tensor for name, tensor in plain_state().items() if not name.endswith(("norm1.bias", "norm2.bias"))}
    assert "norms have no bias, as RMSNorm" in refusal(tmp_path / "rms.pth", state)
    state = {name: tensor for name, tensor in plain_state().items() if name != "pos_embed"}
    assert "no table of position embeddings" in refusal(tmp_path / "positions.pth", state)


def test_what_bare_tensors_do_not_tell_is_said(tmp_path):
    torch.save(plain_state(), tmp_path / "bare.pth")
    assert ASSUMED in logits(tmp_path / "bare.pth", torch.zeros(1, 3, 32, 32), 3)[1]


def test_a_classifier_without_a_norm_is_refused(tmp_path):
    state = {name: tensor for name, tensor in plain_state().items() if not name.startswith("norm.")}
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="its classifier has no norm before it"):
        logits(tmp_path / "bare.pth", torch.zeros(1, 3, 32, 32), 3)


# ---------------------------------------------------------------- Hugging Face

SIZES: dict[str, Any] = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
SIZES |= dict(image_size=32, patch_size=8)
EXACT = ("gelu", "gelu_python")
ACTIVATIONS = (
    *("gelu", "gelu_python", "gelu_10", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("gelu_accurate", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2"),
    *("relu6", "sigmoid", "silu", "swish", "tanh"),
)


def transformers_model(name: str, **changes):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    kind = getattr(transformers, name)
    return scramble(kind(kind.config_class(**(SIZES | {"num_labels": 5} | changes))))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTMSNForImageClassification"])
def test_hidden_act_is_compared(tmp_path, kind, activation):
    model = transformers_model(kind, hidden_act=activation, layer_norm_eps=1e-6)
    model.save_pretrained(tmp_path)
    assert loads(tmp_path, model, 3, (32, 32)) == (activation in EXACT)
    if activation not in EXACT:
        with pytest.raises(ValueError, match=f"config says hidden_act={activation}, ours is gelu"):
            read_pretrained(str(tmp_path))
    (tmp_path / "config.json").unlink()
    report = logits(tmp_path / "model.safetensors", torch.zeros(1, 3, 32, 32), 3)[1]
    assert "Assumed are exact GELU" in report


@pytest.mark.parametrize("eps", [1e-12, 1e-7])
def test_the_eps_of_a_model_that_is_not_trained_is_the_files(tmp_path, eps):
    """As transformers initialises a ViT its tokens vary so little that the eps decides."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**SIZES, num_labels=5, layer_norm_eps=eps)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    assert loads(tmp_path, model, 3, (32, 32))
    report = logits(tmp_path, torch.zeros(1, 3, 32, 32), 3)[1]
    assert f"Its LayerNorms have eps {eps:g}, which the model's get." in report
    encoder = classifier(
        img_size=32, patch_size=8, in_chans=3, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4.0, num_classes=0,
        drop_path=0.0, global_pool="token",
    ).eval()  # fmt: skip
    load_pretrained(encoder, read_pretrained(str(tmp_path)), head="fresh", trained=False)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(x), model.vit(x).last_hidden_state[:, 0], rtol=1e-5, atol=1e-5)
    assert "ours have 1e-06" in str(
        load_pretrained(encoder, read_pretrained(str(tmp_path)), head="fresh")
    )  # no checkpoint records an eps


def test_an_export_has_the_eps_that_its_config_says(tmp_path, caplog):
    transformers_model("ViTForImageClassification", layer_norm_eps=1e-12).save_pretrained(tmp_path)
    file = read_pretrained(str(tmp_path))
    model = classifier(
        img_size=32, patch_size=8, in_chans=3, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4.0, num_classes=5,
        drop_path=0.0, global_pool="token",
    )  # fmt: skip
    load_pretrained(model, file, head="require")
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)} == {1e-12}
    restore_eps(file, model)
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    assert "LayerNorms of eps 1e-12; the exported network has 1e-06" in caplog.text


@pytest.mark.parametrize("activation", ["gelu", "gelu_python", "gelu_new", "relu", "quick_gelu"])
def test_hidden_act_of_a_masked_autoencoder_is_compared(tmp_path, activation):
    decoder: dict[str, Any] = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    decoder |= dict(decoder_intermediate_size=64)
    model = transformers_model("ViTMAEForPreTraining", hidden_act=activation, layer_norm_eps=1e-6, **decoder)
    model.save_pretrained(tmp_path)
    if activation not in EXACT:
        with pytest.raises(ValueError, match=f"hidden_act={activation}"):
            read_pretrained(str(tmp_path))
        return
    ours = MaskedAutoencoder(
        img_size=32, patch_size=8, in_chans=3, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4.0, decoder_embed_dim=16,
        decoder_depth=1, decoder_num_heads=2, norm_pix_loss=False, decoder="self", mask_tokens="decoder",
    ).eval()  # fmt: skip
    load_pretrained(ours, read_pretrained(str(tmp_path)), need_decoder=True)
    x, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    torch.testing.assert_close(ours(x, 0.75, noise).loss, model(x, noise=noise).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "bare"),
    [
        ("DeiTForImageClassificationWithTeacher", {}, "distilled DeiT"),
        ("DeiTForImageClassification", {}, "distilled DeiT"),
        ("Dinov2ForImageClassification", {}, "DINOv2"),
        ("Dinov2Model", {"use_swiglu_ffn": True}, "DINOv2"),
        ("Dinov2WithRegistersForImageClassification", {}, "register tokens"),
        ("DINOv3ViTModel", {}, "register tokens|DINOv3"),
        ("BeitForImageClassification", {"use_relative_position_bias": True}, "relative positions|BEiT"),
        ("CLIPVisionModel", {}, "CLIP"),
        ("SiglipVisionModel", {}, "SigLIP"),
        ("SiglipForImageClassification", None, "SigLIP"),
        ("IJepaForImageClassification", {}, "I-JEPA"),
        ("YolosModel", {"image_size": [32, 32]}, "YOLOS"),
    ],
)
def test_other_models_of_hugging_face_are_refused_by_name(tmp_path, name, changes, bare):
    if changes is None:  # a config of two encoders
        transformers = pytest.importorskip("transformers")
        config = transformers.SiglipConfig(vision_config=SIZES, text_config=dict(SIZES, vocab_size=9), num_labels=5)
        model = transformers.SiglipForImageClassification(config)
    else:
        model = transformers_model(name, **changes)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}.* is another kind of network|Hugging Face's {name} .model_type="):
        read_pretrained(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=f"another kind of network than is computed here: .*({bare})"):
        read_pretrained(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("layer_norm_eps", 1e-5, "layer_norm_eps=1e-05, ours is 1e-06"),
        ("layer_norm_eps", "1e-12", "layer_norm_eps=1e-12, ours is 1e-06"),
        ("use_swiglu_ffn", True, "use_swiglu_ffn=True, which is not known here. Remove that key"),
        ("num_register_tokens", 4, "num_register_tokens=4, which is not known here"),
        ("rope_theta", 100.0, "rope_theta=100.0, which is not known here"),
        ("is_decoder", True, "is_decoder=True, ours is False"),
        ("use_swiglu_ffn", False, ""),
        ("qkv_bias", False, ""),
        ("pooler_act", "relu", ""),
    ],
)
def test_each_setting_of_a_hugging_face_config_is_compared(tmp_path, key, value, words):
    changes = {"layer_norm_eps": 1e-6} | ({key: value} if key == "qkv_bias" else {})
    model = transformers_model("ViTForImageClassification", **changes)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if words:
        with pytest.raises(ValueError, match=words):
            read_pretrained(str(tmp_path))
    else:
        assert loads(tmp_path, model, 3, (32, 32))


def test_the_config_beside_a_link_of_the_hubs_cache_is_read(tmp_path):
    """The cache's files lie under their checksums, and a snapshot's names are links to them."""
    model = transformers_model("ViTForImageClassification", hidden_act="relu", layer_norm_eps=1e-6)
    (blobs := tmp_path / "blobs").mkdir()
    model.save_pretrained(folder := tmp_path / "snapshots" / "main")
    (folder / "model.safetensors").rename(blobs / "0a1b")
    (folder / "model.safetensors").symlink_to(blobs / "0a1b")
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(ValueError, match="hidden_act=relu"):
            read_pretrained(str(path))


def test_what_an_export_says_of_itself_is_compared(tmp_path):
    metadata = {"library": '"x"', "hidden_act": '"relu"'}
    safetensors.torch.save_file(plain_state(), tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="hidden_act=relu, ours is gelu"):
        read_pretrained(str(tmp_path / "model.safetensors"))


def test_a_whole_config_of_transformers_is_known():
    transformers = pytest.importorskip("transformers")
    for kind in (transformers.ViTConfig, transformers.ViTMAEConfig, transformers.ViTMSNConfig):
        config = kind(architectures=["X"], num_labels=3, layer_norm_eps=1e-6).to_dict()
        assert huggingface.config_difference(config) == ""


def test_a_head_for_masked_images_is_left_out(tmp_path):
    model = transformers_model("ViTForMaskedImageModeling", encoder_stride=8)
    model.save_pretrained(tmp_path)
    file = read_pretrained(str(tmp_path))
    assert file.kind == "Hugging Face ViT, pretrained (encoder only)"
    assert "decoder.0.weight is left out" in " ".join(file.notes)
