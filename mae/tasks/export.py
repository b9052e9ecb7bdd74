"""Export of a checkpoint, ours or another's, to a file of another library."""

import logging
import time
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig
from torch import nn

from mae.config.from_run import settings_of
from mae.data.crops import pair
from mae.data.transforms import kept_fraction
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.models.layers import LAYER_NORM_EPS, set_layer_norm_eps
from mae.models.mae import MaskedAutoencoder
from mae.runs.summary import Summary
from mae.tasks.inference import load_classifier
from mae.tasks.init_weights import channels, image_top, need_init, read_from, warn_of_statistics
from mae.tasks.segment_evaluate import load_segmenter
from mae.tasks.visualize import load_autoencoder
from mae.tracking.base import Tracker
from mae.weights.export import export as write
from mae.weights.export_card import Facts, run_facts
from mae.weights.read import PretrainedWeights, read_pretrained
from mae.weights.remote import push_to_hub as push

log = logging.getLogger(__name__)


def export(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    *,
    format: Literal["timm", "huggingface", "reference", "safetensors", "onnx", "torch_export", "smp"],
    path: str | None,
    norm_pix_loss: bool | None,
    push_to_hub: str | None,
) -> Summary:
    """Writes the model that `init` names, and a card about it, to `path`; null: `export/FORMAT` in the run.

    `push_to_hub` is a model of the Hugging Face Hub to which the files are uploaded.
    """
    begun = time.perf_counter()
    tracker.start(0, 0)
    written: list[Path] = []
    checkpoint = need_init(cfg)
    if ranks.main:
        pretrained = read_pretrained(checkpoint)
        checkpoint = read_from(cfg, pretrained)
        classes, encoder_only = [], False
        with torch.no_grad():
            if head := pretrained.decode_head or pretrained.head:
                segmenter = pretrained.decode_head is not None
                model = load_segmenter(cfg, pretrained) if segmenter else load_classifier(cfg, pretrained, head.classes)
                names = pretrained.meta.classes
                classes = names if len(names) == head.classes else []
            else:
                model, encoder_only = autoencoder(cfg, pretrained, norm_pix_loss, need_decoder=format == "huggingface")
        restore_eps(pretrained, model)
        check_grid(pretrained, model.patch_embed.grid_size, cfg)
        warn_of_statistics(cfg, pretrained)
        facts = Facts(
            name=cfg.model.name,
            source=pretrained.kind,
            mean=channels(cfg.data.mean, cfg.model.in_chans),
            std=channels(cfg.data.std, cfg.model.in_chans),
            crop=kept_fraction(pair(cfg.model.img_size), cfg.data.crop_fraction),
            top=image_top(cfg),
            classes=classes,
            encoder_only=encoder_only,
            mask_ratio=pretrained.mask_ratio,
            norm_pix_loss=pretrained.norm_pix_loss if norm_pix_loss is None else norm_pix_loss,
            **run_facts(settings_of(cfg.init), pretrained.meta.step),
        )
        written = write(model, format=format, path=path or str(run / "export" / format), facts=facts)
        log.info("wrote %s", ", ".join(str(file) for file in written))
    ranks.barrier()
    results: dict[str, object] = {"files": [str(file) for file in written]}
    if push_to_hub is not None and ranks.main:
        results["hub"] = push(push_to_hub, written)
        log.info("uploaded to %s: init=hf://%s reads it", results["hub"], push_to_hub)
    return Summary("export", time.perf_counter() - begun, checkpoint=checkpoint, results=results)


def autoencoder(
    cfg: DictConfig, pretrained: PretrainedWeights, norm_pix_loss: bool | None, need_decoder: bool
) -> tuple[MaskedAutoencoder, bool]:
    """The masked autoencoder in a checkpoint, and whether its decoder has random weights.

    Raises UserError where weights of the encoder are missing.
    """
    if need_decoder and not pretrained.has_decoder:
        raise UserError(
            f"init={pretrained.path} ({pretrained.kind}) holds no decoder, which Hugging Face's ViTMAE has: choose "
            "task.format=timm, which takes the encoder alone."
        )
    model, report = load_autoencoder(cfg, pretrained, norm_pix_loss, need_decoder)
    decoder = model.decoder_keys()
    if lacking := [name for name in report.fresh if name not in decoder]:
        theirs = pretrained.sizes.get("decoder", model.decoder_name)
        other = theirs != model.decoder_name
        advice = f"set model.decoder={theirs}" if other else "fine-tune it first, and export that run"
        raise UserError(
            f"init={pretrained.path} ({pretrained.kind}) lacks {', '.join(lacking)}, which the exported network would "
            f"have: {advice}."
        )
    return model, bool(decoder & set(report.fresh))


def restore_eps(pretrained: PretrainedWeights, model: nn.Module) -> None:
    """Gives LayerNorms the eps that every export has: timm's and the reference's formats record none."""
    theirs = pretrained.sizes.get("layer_norm_eps", LAYER_NORM_EPS)
    if theirs != LAYER_NORM_EPS:
        set_layer_norm_eps(model, LAYER_NORM_EPS)
        log.warning(
            "init=%s has LayerNorms of eps %g; the exported network has %g, which changes its numbers slightly",
            pretrained.path, theirs, LAYER_NORM_EPS,
        )  # fmt: skip


def check_grid(pretrained: PretrainedWeights, grid: tuple[int, int], cfg: DictConfig) -> None:
    """Raises UserError where the weights are of another image size: an export keeps their bits."""
    table = pretrained.position_table("pos_embed", grid) if "pos_embed" in pretrained.state else None
    theirs = None if table is None else pretrained.grid(table.shape[1] - 1, grid)
    if theirs is not None and theirs != tuple(grid):
        size = [side * patch for side, patch in zip(theirs, pair(cfg.model.patch_size), strict=True)]
        typed = size[0] if size[0] == size[1] else f"[{size[0]},{size[1]}]"
        raise UserError(
            f"init={pretrained.path} ({pretrained.kind}) is for {theirs[0]} x {theirs[1]} patches, and the model for "
            f"{grid[0]} x {grid[1]} (model.img_size={cfg.model.img_size}): choose the data that it was trained on "
            f"(data=NAME brings size, mean and std), and model.img_size={typed} where it is not theirs."
        )
