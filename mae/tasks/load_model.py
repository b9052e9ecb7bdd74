"""`mae.load`: from a run or a file to an `ImageModel`, with the settings that the run or the file states."""

from omegaconf import DictConfig, OmegaConf

from mae.config.check import resolve
from mae.config.compose import composed
from mae.config.from_run import settings_of
from mae.config.saved import read_config
from mae.config.values import near
from mae.errors import UserError
from mae.tasks.inference import ImageModel
from mae.tasks.segment_inference import image_model
from mae.weights.read import PretrainedWeights, read_pretrained
from mae.weights.unstated import normalisation, number_of_heads

MODEL = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
DATA = ("mean", "std", "crop_fraction", "exif_orientation", "max_pixels")


def load_model(source: str, settings: dict[str, object]) -> ImageModel:
    """The model in a run, a checkpoint or a file; see `mae.load`."""
    pretrained = read_pretrained(source)
    if unknown := [key for key in settings if key not in (*MODEL, *DATA)]:
        raise UserError(f"{unknown[0]} is no setting of mae.load.{near(unknown[0], (*MODEL, *DATA))}")
    run = settings_of(pretrained.meta.folder or source)
    cfg = config_of_file(pretrained, settings) if run is None else read_config(run)
    OmegaConf.set_readonly(cfg, False)
    for key, value in settings.items():
        cfg["model" if key in MODEL else "data"][key] = value
    return image_model(cfg, pretrained)


def config_of_file(pretrained: PretrainedWeights, settings: dict[str, object]) -> DictConfig:
    """A config with the sizes and the preprocessing that a file states, and else those of data=folder.

    Raises UserError where neither the file nor `settings` say what no tensor tells.
    """
    cfg = resolve(composed(["data=folder"]))
    OmegaConf.set_struct(cfg, False)
    sizes = {**pretrained.sizes, **{key: value for key, value in settings.items() if key in MODEL}}
    sizes.setdefault("mlp_ratio", cfg.model.mlp_ratio)
    height, width = pair_of(sizes["patch_size"])
    if "num_heads" not in sizes:
        sizes["num_heads"] = number_of_heads(pretrained, "type mae.load(..., num_heads=12)")
    if "img_size" not in sizes:
        sizes["img_size"] = image_size(pretrained, (height, width))
    for key in MODEL:
        cfg.model[key] = sizes[key]
    cfg.data.in_chans = cfg.model.in_chans
    if missing := [key for key in ("mean", "std") if key not in settings]:
        advice = f"give {', '.join(f'{key}=[...]' for key in missing)}"
        OmegaConf.update(cfg, "data", normalisation(pretrained, 255.0, advice))
    if pretrained.preprocessing is not None:
        cfg.data.crop_fraction = pretrained.preprocessing.crop
    return cfg


def image_size(pretrained: PretrainedWeights, patch: tuple[int, int]) -> list[int]:
    """[height, width] of the images, from the position table. Raises UserError where that does not tell."""
    table = pretrained.position_table("pos_embed", (0, 0)) if "pos_embed" in pretrained.state else None
    grid = None if table is None else pretrained.grid(table.shape[1] - 1, (0, 0))
    if grid is None:
        raise UserError(f"{pretrained} does not say its image size: type mae.load(..., img_size=224).")
    return [grid[0] * patch[0], grid[1] * patch[1]]


def pair_of(size: object) -> tuple[int, int]:
    """A side or [height, width] as (height, width)."""
    if isinstance(size, int):
        return size, size
    assert isinstance(size, list | tuple)
    return size[0], size[1]
