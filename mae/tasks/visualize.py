"""Pictures of what a model makes and attends to: reconstructions at several masks, and the class token's attention."""

import base64
import html
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae import data, device, rng
from mae.config.build import build, call
from mae.config.check import to_dict
from mae.config.compose import composed
from mae.data import transforms
from mae.data.dataset import STREAM_NOISE
from mae.data.prepare import Prepare
from mae.data.source import BadImage, Source
from mae.data.sources.named import named_files
from mae.data.subsets import Subset
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.models.layers import Block
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import bind_masking
from mae.runs.files import write_text
from mae.runs.summary import Summary
from mae.tasks import images as pictures
from mae.tasks.autoencoder import build_autoencoder
from mae.tasks.inference import load_classifier
from mae.tasks.init_weights import need_init, read_from, warn_of_statistics
from mae.tracking.base import Tracker
from mae.weights.load import LoadReport, load_pretrained
from mae.weights.read import PretrainedWeights, read_pretrained

log = logging.getLogger(__name__)


def visualize(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    *,
    files: list[str] | None,
    num_images: Annotated[int, "[1, inf)"],
    mask_ratios: list[Annotated[float, "(0, 1)"]],
    masks: list[str],
    reconstruction: bool,
    attention: bool,
    norm_pix_loss: bool | None,
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
) -> Summary:
    """PNGs in `images/` and all of them in one page, `visualize.html`. Rank 0 makes them."""
    begun = time.perf_counter()
    tracker.start(0, 0)
    written: dict[str, Path] = {}  # title -> file
    names: list[str] = []
    checkpoint = need_init(cfg)
    if ranks.main:
        pretrained = read_pretrained(checkpoint)
        checkpoint = read_from(cfg, pretrained)
        warn_of_statistics(cfg, pretrained)
        dtype = device.number_format(precision, ranks.device)
        prepare = call(Prepare, cfg.data).to(ranks.device)
        images, names = chosen_images(cfg, files, num_images)
        weights = device.weight_format(dtype)
        images = prepare(images.to(ranks.device)).to(dtype=weights)
        with torch.no_grad(), device.inference_autocast(dtype, ranks.device):
            if reconstruction:
                model, _ = load_autoencoder(cfg, pretrained, norm_pix_loss, True, prepare)
                model.to(ranks.device, weights)
                for kind in drawn_masks(cfg, masks):
                    for ratio in dict.fromkeys(mask_ratios):
                        rows = reconstruct(model, images, masking_settings(cfg, kind), ratio, cfg.seed, prepare)
                        path = run / "images" / f"reconstruction_{kind}_{100 * ratio:02g}.png"
                        pictures.save_rows(rows, path)
                        written[f"Reconstruction: {kind} masking, {100 * ratio:g} % removed"] = path
            if attention:
                model = attention_network(cfg, pretrained).to(ranks.device, weights)
                maps = class_attention(model, images)
                path = run / "images" / "attention.png"
                pictures.save_rows(attention_rows(prepare.undo(images), maps, model.patch_embed.grid_size), path)
                written["Attention of the class token in the last block: mean and single heads"] = path
        for title, path in written.items():
            tracker.picture(path.stem, path, 0, title)
        write_text(run / "visualize.html", page(cfg, pretrained.kind, names, written))
    ranks.barrier()
    paths = sorted(str(path.relative_to(run)) for path in written.values())
    return Summary(
        "visualize",
        time.perf_counter() - begun,
        images_seen=len(names),
        checkpoint=checkpoint,
        results={"page": "visualize.html", "pictures": paths},
    )


def chosen_images(cfg: DictConfig, files: list[str] | None, count: int) -> tuple[Tensor, list[str]]:
    """Images (B, C, H, W) as the source has them, and their names: of `files`, or spread over the validation set."""
    if files:
        source: Source = named_files(files, cfg.data)
    else:
        whole: Source = build(data.SOURCES, cfg.data, "val")
        source = Subset(whole, np.unique(np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(int)))
    crop = call(transforms.CenterCrop, {"img_size": cfg.model.img_size, "crop_fraction": cfg.data.crop_fraction})
    names = [source.name(k) for k in range(len(source))]
    return torch.stack([crop(read_image(source, k)) for k in range(len(source))]), names


def read_image(source: Source, index: int) -> Tensor:
    """An image. Raises UserError where it cannot be read."""
    try:
        return source[index][0]
    except (BadImage, OSError) as error:
        raise UserError(f"{source.name(index)} cannot be used: {error}.") from error


def load_autoencoder(
    cfg: DictConfig,
    pretrained: PretrainedWeights,
    norm_pix_loss: bool | None,
    need_decoder: bool,
    prepare: Prepare | None = None,
) -> tuple[MaskedAutoencoder, LoadReport]:
    """The masked autoencoder in a checkpoint, and what of it was loaded. It predicts what the checkpoint's does.

    Raises UserError where its decoder is needed and is absent, does not fit, or does not say what it predicts.
    """
    normalised = pretrained.norm_pix_loss if norm_pix_loss is None else norm_pix_loss
    target = pretrained.target or cfg.target
    if cfg.target.name not in ("pixels", target["name"]):
        raise UserError(f"init={pretrained.path} predicts {target['name']}: leave target={cfg.target.name} out.")
    if target["name"] == "pixels" and normalised is None and pretrained.has_decoder and need_decoder:
        raise UserError(
            f"init={pretrained.path} does not say whether it predicts normalised patches: set task.norm_pix_loss=true "
            "or false. (The reference's mae_visualize_* files: false; those pretrained for accuracy: true.)"
        )
    width = None if need_decoder else pretrained.predicted_values
    prepare = call(Prepare, cfg.data) if prepare is None else prepare
    model = build_autoencoder(cfg, target, target["name"] == "pixels" and bool(normalised), prepare, width)
    report = load_pretrained(model, pretrained, need_decoder=need_decoder, trained=False)
    return model.eval(), report


def attention_network(cfg: DictConfig, pretrained: PretrainedWeights) -> MaskedAutoencoder | VisionTransformer:
    """The network whose class token's attention is drawn. Raises UserError where there is none."""
    if not pretrained.has_class_token:
        raise UserError(
            f"init={pretrained.path} ({pretrained.kind}) has no class token whose attention could be drawn: set "
            "task.attention=false."
        )
    if pretrained.head is None:
        return load_autoencoder(cfg, pretrained, None, need_decoder=False)[0]
    return load_classifier(cfg, pretrained, 0)


def drawn_masks(cfg: DictConfig, masks: list[str]) -> list[str]:
    """`masks`, and the masking that the config chooses where that is not the default."""
    return masks if cfg.masking.name in (*masks, "random") else [*masks, cfg.masking.name]


def masking_settings(cfg: DictConfig, name: str) -> DictConfig:
    """The group `masking` of the config where it is the one named, else its file in conf/masking."""
    if cfg.masking.name == name:
        return cfg.masking
    other = OmegaConf.create(to_dict(cfg))
    other.masking = composed([f"masking={name}"]).masking
    OmegaConf.resolve(other.masking)  # which may name values of the model
    return other.masking


def reconstruct(
    model: MaskedAutoencoder, images: Tensor, masking: DictConfig, ratio: float, seed: int, prepare: Prepare
) -> dict[str, Tensor]:
    """Rows of images in [0, 1]: original, masked, and what is predicted; see `reconstruction_rows`."""
    keys = rng.keys(seed, 0, np.arange(len(images)), STREAM_NOISE)
    noise = torch.from_numpy(bind_masking(masking, model.grid_size, ratio)(keys)).to(images.device)
    pred, mask = model.predict(images, ratio, noise)
    return pictures.reconstruction_rows(model, images, pred.float(), mask, prepare.undo)


def class_attention(model: MaskedAutoencoder | VisionTransformer, images: Tensor) -> Tensor:
    """Attention (B, heads, L) of the class token to the patches in the last block, summing to at most 1."""
    block = list(model.blocks)[-1]
    assert isinstance(block, Block)
    inputs: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    try:
        model.forward_features(images)
    finally:
        hook.remove()
    projected = block.attn.qkv(block.norm1(inputs[0])).chunk(3, -1)
    q, k, _ = (t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in projected)
    weights = (q[:, :, :1].float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
    return weights.softmax(-1)[:, :, 0, 1:]


def attention_rows(images: Tensor, maps: Tensor, grid: tuple[int, int], most: int = 6) -> dict[str, Tensor]:
    """Images in [0, 1] and their attention maps, each scaled to its largest value, over the darkened image."""
    grey = images.mean(1, keepdim=True)

    def overlay(attention: Tensor) -> Tensor:  # (B, L)
        heat = attention / attention.amax(1, keepdim=True).clamp(min=1e-12)
        heat = F.interpolate(heat.unflatten(1, grid)[:, None], size=images.shape[2:], mode="nearest")
        return torch.cat([0.35 * grey + 0.65 * heat, 0.35 * grey + 0.45 * heat**2, 0.35 * grey], 1)

    rgb = images if images.shape[1] == 3 else grey.expand(-1, 3, -1, -1)
    heads = {f"head {k + 1}": overlay(maps[:, k]) for k in range(min(most, maps.shape[1]))}
    return {"image": rgb, "mean": overlay(maps.mean(1)), **heads}


def page(cfg: DictConfig, kind: str, names: list[str], files: Mapping[str, Path]) -> str:
    """One HTML page with the pictures in it, that needs no other file."""
    sections = []
    for title, path in files.items():
        picture = base64.b64encode(path.read_bytes()).decode()
        sections.append(
            f"<h2>{html.escape(title)}</h2>\n<img alt='{html.escape(title)}' src='data:image/png;base64,{picture}'>"
        )
    rows = ", ".join(html.escape(name) for name in names)
    return (
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>Masked autoencoder: pictures</title>\n"
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%;image-rendering:pixelated}h2{font-size:1.1rem}</style>\n"
        f"<h1>{html.escape(cfg.model.name)} on {html.escape(cfg.data.name)}</h1>\n"
        f"<p>Weights: {html.escape(str(cfg.init))} ({html.escape(kind)}). Columns from the left: {rows}.</p>\n"
        + "\n".join(sections)
        + "\n</html>\n"
    )
