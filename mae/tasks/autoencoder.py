"""The masked autoencoder of a config, with what it predicts."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from mae.checkpoint import weights_digest
from mae.config.build import build, call
from mae.data.prepare import Prepare
from mae.errors import UserError
from mae.models.layers import patch_grid
from mae.models.mae import MaskedAutoencoder
from mae.models.target import Patches
from mae.models.targets import TARGETS
from mae.models.teacher import Teacher, absent_teacher
from mae.models.vit import classifier
from mae.tasks.init_weights import channels, image_top
from mae.weights.load import load_pretrained
from mae.weights.read import PretrainedWeights, read_pretrained
from mae.weights.unstated import normalisation, number_of_heads

log = logging.getLogger(__name__)

STATED = "state it in the file, as torch.save({'model': weights, 'args': {%s}}, FILE)"  # what a teacher's user types


def build_autoencoder(
    cfg: DictConfig, target: Mapping[str, Any], norm_pix_loss: bool, prepare: Prepare, width: int | None = None
) -> MaskedAutoencoder:
    """An autoencoder with initial weights. `target` holds the settings of the group.

    With the `width` of its predictions no teacher is read: nothing is compared with them. Raises UserError.
    """
    _, size, grid = patch_grid(*(cfg.model[key] for key in ("img_size", "patch_size")))

    def teacher(name: str) -> Teacher:
        return absent_teacher(width) if width is not None else read_teacher(cfg, name, grid)

    patches = Patches(grid, size, cfg.model.in_chans, norm_pix_loss, prepare.undo, teacher)
    built = build(TARGETS, target, patches)
    built.settings = {str(key): value for key, value in target.items()}
    return call(MaskedAutoencoder, cfg.model, built, norm_pix_loss=norm_pix_loss)


def read_teacher(cfg: DictConfig, name: str, grid: tuple[int, int]) -> Teacher:
    """The network that `target.teacher` names, on the host. Raises UserError where it sees other patches."""
    from mae.distributed.fsdp import with_memory  # seconds to import

    # a plan, and all ranks but the first of a sharded run, build without memory, and read the teacher all the same
    with torch.device("cpu"), with_memory():
        try:
            pretrained = read_pretrained(name)
        except UserError as error:
            raise UserError(str(error).replace("init=", "target.teacher=")) from error
        pretrained.key = "target.teacher"
        check_patches(cfg, name, pretrained, grid)
        sizes = pretrained.sizes
        width = sizes["embed_dim"]
        network = classifier(
            img_size=cfg.model.img_size,
            patch_size=sizes["patch_size"],
            in_chans=sizes["in_chans"],
            embed_dim=width,
            depth=sizes["depth"],
            num_heads=number_of_heads(pretrained, STATED % "'num_heads': 12"),
            mlp_ratio=sizes.get("mlp_ratio", 4.0),
            num_classes=0,
            drop_path=0.0,
            global_pool="avg",
        )
        load_pretrained(network, pretrained, head="fresh", trained=False)
        return Teacher(width, sizes["depth"], network, *adjustment(cfg, pretrained))


def check_patches(cfg: DictConfig, name: str, pretrained: PretrainedWeights, grid: tuple[int, int]) -> None:
    """Raises UserError where a teacher has other channels or another grid of patches than the model."""
    sizes = pretrained.sizes
    if sizes["in_chans"] != cfg.model.in_chans:
        raise UserError(
            f"target.teacher={name} sees {sizes['in_chans']} channels and the model {cfg.model.in_chans}: set "
            f"data.in_chans={sizes['in_chans']}, or name another teacher."
        )
    image, _, _ = patch_grid(*(cfg.model[key] for key in ("img_size", "patch_size")))
    patch = sizes["patch_size"]
    table = pretrained.position_table("pos_embed", grid)
    stated = None if table is None else pretrained.grid(table.shape[1] - 1, grid)
    seen = (image[0] // patch[0], image[1] // patch[1]) if not (image[0] % patch[0] or image[1] % patch[1]) else None
    if seen != grid or stated not in (None, grid):
        theirs = stated or seen
        of = f"{theirs[0]} x {theirs[1]} patches" if theirs else "patches"
        raise UserError(
            f"target.teacher={name} has {of} of {patch[0]} x {patch[1]} pixels, and the model {grid[0]} x {grid[1]} "
            f"patches (model.img_size={cfg.model.img_size}, model.patch_size={cfg.model.patch_size}): choose the same "
            "sizes, or name another teacher."
        )


def adjustment(cfg: DictConfig, pretrained: PretrainedWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C, 1, 1) from images as the data are normalised to those that a teacher was trained with."""
    count = cfg.model.in_chans
    mean, std = (torch.tensor(channels(cfg.data[key], count)).view(-1, 1, 1) for key in ("mean", "std"))
    theirs = normalisation(pretrained, image_top(cfg), STATED % "'mean': [...], 'std': [...]")
    their_mean, their_std = (torch.tensor(channels(theirs[key], count)).view(-1, 1, 1) for key in ("mean", "std"))
    return std / their_std, (mean - their_mean) / their_std


def restore_teacher(teacher: Teacher, digest: str, name: str) -> None:
    """Compares a teacher with the one of `digest` that a run began with, and warns where it is another.

    Earlier versions showed it images as the data are normalised where its file says nothing: such a run goes on so.
    """
    if weights_digest(teacher.state_dict()) == digest:
        return
    scale, shift = teacher.scale.clone(), teacher.shift.clone()
    teacher.scale.fill_(1.0)
    teacher.shift.zero_()
    if weights_digest(teacher.state_dict()) == digest:
        log.warning("target.teacher=%s: it still sees images by data.mean and data.std, as when the run began", name)
        return
    teacher.scale.copy_(scale)
    teacher.shift.copy_(shift)
    log.warning(
        "target.teacher=%s has other weights than when the run began: features of another network are predicted from "
        "here on",
        name,
    )
