"""The weights that `init` names: which checkpoint was read, and whether images are prepared as its were."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np
from omegaconf import DictConfig
from torch import Tensor, nn

from mae import data
from mae.checkpoint import step_name, weights_digest
from mae.config.build import build
from mae.config.from_run import stands_for
from mae.config.rules import missing_init
from mae.data.crops import pair
from mae.data.prepare import top_of
from mae.data.source import BadImage, Source
from mae.data.sources.scientific import BANDS
from mae.data.transforms import kept_fraction
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.weights.read import PretrainedWeights

log = logging.getLogger(__name__)


def need_init(cfg: DictConfig) -> str:
    """`init`. Raises UserError where it is not given."""
    if problem := missing_init(cfg.task.name, cfg.init):
        raise UserError(problem)
    return cfg.init


def read_from(cfg: DictConfig, pretrained: PretrainedWeights) -> str:
    """The checkpoint that `init` stood for when it was read, or `init` itself."""
    now, step = stands_for(cfg.init), pretrained.meta.step
    return cfg.init if now is None or step is None else str(now.with_name(step_name(step)))


def same_weights(ranks: Ranks, model: nn.Module, key: str = "init") -> None:
    """Raises UserError where ranks have read different weights, of a run that was just going on, named by `key`."""
    if ranks.world > 1 and len(set(ranks.gather(weights_digest(model.state_dict())))) > 1:
        raise UserError(
            f"{key}= names a run that goes on meanwhile, and ranks have read different checkpoints: name one of them, "
            f"as {key}=RUN/checkpoints/STEP."
        )


def warn_of_statistics(cfg: DictConfig, pretrained: PretrainedWeights) -> None:
    """Warns where `data.mean` and `data.std` are not those that the weights were trained with."""
    theirs = pretrained.preprocessing
    if theirs is None:
        return
    for key, stated in theirs.of_images_up_to(image_top(cfg)).items():
        ours = list(cfg.data[key])
        count = max(len(ours), len(stated))
        if len({1, count, len(ours), len(stated)}) > 2:
            continue  # of other channels, so nothing is comparable
        if not np.allclose(channels(ours, count), channels(stated, count), rtol=1e-3, atol=1e-3):
            values = ",".join(f"{value:g}" for value in stated)
            log.warning(
                "init=%s was trained on images of data.%s=[%s], and these are normalised by %s: set data.%s=[%s] to "
                "show it images as it knows them",
                pretrained.path, key, values, ours, key, values,
            )  # fmt: skip


def warn_of_crop(cfg: DictConfig, pretrained: PretrainedWeights) -> None:
    """Warns where images are resized or cropped otherwise than the classifier's file says."""
    theirs = pretrained.preprocessing
    if theirs is None:
        return
    ours = kept_fraction(pair(cfg.model.img_size), cfg.data.crop_fraction)
    if theirs.crop and abs(theirs.crop - ours) > 5e-3:
        log.warning(
            "init=%s is for images of which %.4g of a side is kept, and of these %.4g is: set data.crop_fraction=%.4g "
            "to show it images as it knows them",
            pretrained.path, theirs.crop, ours, theirs.crop,
        )  # fmt: skip
    if theirs.interpolation in ("nearest", "lanczos", "bilinear", "box", "hamming"):
        log.warning(
            "init=%s is for images that are resized by %s interpolation, and these are by bicubic: its accuracy can "
            "differ a little",
            pretrained.path, theirs.interpolation,
        )  # fmt: skip


def image_top(cfg: DictConfig) -> float | None:
    """The divisor of image values before `data.mean` and `data.std`: 255, 65535, or 1 where they are floating.

    None where only an image could tell, and none can be read.
    """
    if cfg.data.name not in BANDS:
        return 255.0  # every other source decodes to 8 bits
    for split in ("val", "train"):
        with contextlib.suppress(ValueError, OSError):
            source: Source = build(data.SOURCES, cfg.data, split)
            if (image := next(readable(source), None)) is not None:
                return top_of(image)
    return None


def readable(source: Source) -> Iterator[Tensor]:
    """The images of a source that are not bad."""
    for index in range(len(source)):
        with contextlib.suppress(BadImage, OSError):
            yield source[index][0]


def channels(values: Sequence[float], count: int) -> list[float]:
    """One value a channel, where one is given for all."""
    return list(values) * (count if len(values) == 1 else 1)
