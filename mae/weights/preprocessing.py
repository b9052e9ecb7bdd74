"""How a checkpoint's training images were prepared, as the files beside it say."""

from dataclasses import dataclass

from mae.weights.metadata import Metadata, Settings, section

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
    crop: float | None = None  # the share of a side that evaluation keeps
    interpolation: str | None = None

    def of_images_up_to(self, top: float | None) -> dict[str, list[float]]:
        """`mean` and `std` for images that are divided by `top`: 255, 65535, or 1 where values are floating."""
        scale = 1.0
        if self.rescale and top and not (top > 1 and any(abs(self.rescale / f - 1) < 1e-3 for f in FULL_RANGE)):
            scale = 1 / (self.rescale * top)
        return {key: [value * scale for value in getattr(self, key)] for key in ("mean", "std")}


def preprocessing_of(meta: Metadata) -> Preprocessing | None:
    """From a run's config, timm's config.json, Hugging Face's preprocessor_config.json, or saved arguments."""
    if data := section(meta.config, "data"):
        return _statistics(data.get("mean"), data.get("std"))
    flat = meta.config if "architecture" in meta.config else {}  # as in older folders of timm
    timm = section(meta.config, "pretrained_cfg") or flat
    return _of_timm(timm) or _of_hugging_face(meta.processor) or _of_arguments(meta.args)


def _statistics(
    mean: object,
    std: object,
    rescale: float | None = None,
    crop: float | None = None,
    interpolation: str | None = None,
) -> Preprocessing | None:
    means, stds = _numbers(mean), _numbers(std)
    return None if means is None or stds is None else Preprocessing(means, stds, rescale, crop, interpolation)


def _numbers(value: object) -> list[float] | None:
    values = [value] if isinstance(value, int | float) else value
    if isinstance(values, list | tuple) and all(isinstance(number, int | float) for number in values):
        return list(values)
    return None


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _of_timm(config: Settings) -> Preprocessing | None:
    name = config.get("interpolation")
    name = name if isinstance(name, str) else None
    return _statistics(config.get("mean"), config.get("std"), crop=_number(config.get("crop_pct")), interpolation=name)


def _of_hugging_face(config: Settings) -> Preprocessing | None:
    """Settings that are missing have the defaults of the processor's class."""
    if not config:
        return None
    rescale = _number(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
    mean, std = config.get("image_mean"), config.get("image_std")
    if mean is None and {config.get("image_processor_type"), config.get("feature_extractor_type")} & HALVES_BY_DEFAULT:
        mean, std = HALVES
    if not config.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    number = config.get("resample")
    name = FILTERS[number] if isinstance(number, int) and number < len(FILTERS) else None
    return _statistics(mean, std, rescale, _crop(config), name)


def _crop(config: Settings) -> float | None:
    """The share of the shorter side that is kept, where the image is resized by its shorter side and then cut."""
    edge, crop = section(config, "size").get("shortest_edge"), config.get("crop_size")
    side = crop.get("height") if isinstance(crop, dict) else crop
    return side / edge if config.get("do_center_crop") and isinstance(edge, int) and isinstance(side, int) else None


def _of_arguments(args: Settings) -> Preprocessing | None:
    imagenet = args.get("imagenet_default_mean_and_std")  # MAE-pytorch's and BEiT's
    if isinstance(imagenet, bool):
        mean, std = IMAGENET if imagenet else HALVES
        return _statistics(mean, std, rescale=1 / 255)
    return _statistics(  # timm's, ours
        args.get("mean"),
        args.get("std"),
        rescale=_number(args.get("rescale_factor")),
        crop=_number(args.get("crop_pct")),
    )
