"""How the images were prepared that a checkpoint was trained on, as the files beside it say."""

from dataclasses import dataclass
from typing import Any

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALVES = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
FULL_RANGE = (1 / 255, 1 / 65535)  # factors that bring whole numbers to [0, 1]
HALVES_BY_DEFAULT = {"ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor"}
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers, in Hugging Face's files


@dataclass(frozen=True)
class Preprocessing:
    """An image's values times `rescale`, less `mean`, over `std`; what no file says is None."""

    mean: list[float]
    std: list[float]
    rescale: float | None = None
    crop: float | None = None  # the part of a side that evaluation keeps
    interpolation: str | None = None

    def of_images_up_to(self, top: float | None) -> dict[str, list[float]]:
        """`mean` and `std` for images that are divided by `top`: 255, 65535, or 1 where values are floating."""
        scale = 1.0
        if self.rescale and top and not (top > 1 and any(abs(self.rescale / f - 1) < 1e-3 for f in FULL_RANGE)):
            scale = 1 / (self.rescale * top)
        return {key: [value * scale for value in getattr(self, key)] for key in ("mean", "std")}


def stated(config: dict[str, Any], args: dict[str, Any], processor: dict[str, Any]) -> Preprocessing | None:
    """From a run's config, timm's config.json, Hugging Face's preprocessor_config.json, or saved arguments."""
    data = config.get("data")
    if isinstance(data, dict):
        return _statistics(data.get("mean"), data.get("std"))
    timm = config.get("pretrained_cfg") or (config if "architecture" in config else {})  # flat in older folders
    return _of_timm(timm) or _of_hugging_face(processor) or _of_arguments(args)


def _statistics(mean: Any, std: Any, **more: Any) -> Preprocessing | None:
    values = [[side] if isinstance(side, int | float) else side for side in (mean, std)]
    if not all(isinstance(side, list | tuple) and all(isinstance(v, int | float) for v in side) for side in values):
        return None
    return Preprocessing(list(values[0]), list(values[1]), **more)


def _of_timm(config: dict[str, Any]) -> Preprocessing | None:
    more = {"crop": config.get("crop_pct"), "interpolation": config.get("interpolation")}
    return _statistics(config.get("mean"), config.get("std"), **more)


def _of_hugging_face(config: dict[str, Any]) -> Preprocessing | None:
    """The parts that are missing are the class' own defaults."""
    if not config:
        return None
    rescale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    mean, std = config.get("image_mean"), config.get("image_std")
    if (
        mean is None
        and (config.get("image_processor_type") or config.get("feature_extractor_type")) in HALVES_BY_DEFAULT
    ):
        mean, std = HALVES
    if not config.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    number = config.get("resample")
    name = FILTERS[number] if isinstance(number, int) and number < len(FILTERS) else None
    return _statistics(mean, std, rescale=rescale, crop=_crop(config), interpolation=name)


def _crop(config: dict[str, Any]) -> float | None:
    """The part of the shorter side that is kept, where the image is resized by its shorter side and then cut."""
    size, crop = config.get("size"), config.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    side = crop.get("height") if isinstance(crop, dict) else crop
    return side / edge if config.get("do_center_crop") and isinstance(edge, int) and isinstance(side, int) else None


def _of_arguments(args: dict[str, Any]) -> Preprocessing | None:
    imagenet = args.get("imagenet_default_mean_and_std")  # MAE-pytorch's and BEiT's
    if isinstance(imagenet, bool):
        mean, std = IMAGENET if imagenet else HALVES
        return _statistics(mean, std, rescale=1 / 255)
    return _statistics(args.get("mean"), args.get("std"), rescale=args.get("rescale_factor"))  # timm's, our exports'
