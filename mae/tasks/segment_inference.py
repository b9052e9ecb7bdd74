"""A segmenter in evaluation mode with its preprocessing and classes: what `mae.load` returns for it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from omegaconf import DictConfig
from torch import Tensor

from mae.models.segmenter import Segmenter
from mae.tasks.inference import ImageModel, Picture
from mae.tasks.segment_evaluate import window_settings
from mae.tasks.segment_maps import predict_maps
from mae.weights.read import PretrainedWeights


class SegmentationModel(ImageModel):
    """`network` is a Segmenter, and `classes` are the names of the values of its maps. `embed` is that of its encoder.

    Images are segmented whole by the sliding window of the run, as task=evaluate does it.
    """

    def __init__(self, cfg: DictConfig, pretrained: PretrainedWeights):
        super().__init__(cfg, pretrained)
        self.eval_size, self.eval_stride = window_settings(pretrained)

    @torch.no_grad()
    def predict(self, images: Tensor | Picture | Sequence[Picture]) -> list[Tensor]:  # type: ignore[override]
        """The class of each pixel: a map (H, W) uint8 of each image's size, on the host.

        Normalised images are (B, C, H, W), of any size.
        """
        if isinstance(images, Tensor):
            return list(self._maps(self.batch(images), lambda normalised: normalised))
        pictures = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        return list(self.maps(self.decoded(picture, lambda image: image) for picture in pictures))

    def maps(self, images: Iterable[Tensor]) -> Iterator[Tensor]:
        """Maps (H, W) uint8 of images (C, H, W) as a source has them, one after another."""
        return self._maps(images, self.prepare)

    def _maps(self, images: Iterable[Tensor], prepare: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        assert isinstance(self.network, Segmenter)
        return predict_maps(
            self.network,
            prepare,
            images,
            eval_size=self.eval_size,
            eval_stride=self.eval_stride,
            autocast=nullcontext,
        )

    def need_classes(self) -> None:
        """A segmenter always has classes."""


def image_model(cfg: DictConfig, pretrained: PretrainedWeights) -> ImageModel:
    """A checkpoint with its preprocessing: a SegmentationModel where it holds a segmenter."""
    return ImageModel(cfg, pretrained) if pretrained.decode_head is None else SegmentationModel(cfg, pretrained)
