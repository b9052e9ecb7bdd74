"""A network in evaluation mode with its preprocessing and classes: what `mae.load` returns.

Tasks embed and predict compute with the same object; task=evaluate takes its classifier from here.
"""

import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from omegaconf import DictConfig
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.config.build import call
from mae.data.decode import Decoder
from mae.data.prepare import Prepare
from mae.data.source import FAILURES, reason
from mae.data.sources.folder import read
from mae.data.sources.named import decoder_of
from mae.data.sources.robustness import synsets
from mae.data.transforms import CenterCrop
from mae.device import as_float
from mae.errors import UserError
from mae.models.vit import block_output, classifier
from mae.tasks.linprobe import add_probe
from mae.tasks.segment_evaluate import load_segmenter
from mae.weights.load import load_pretrained
from mae.weights.read import PretrainedWeights

Pooling = Literal["avg", "token", "patches"]
Picture = str | os.PathLike[str] | Image.Image  # an image file, or an image that Pillow has opened


class Predictions(NamedTuple):
    """The most probable classes of images, in falling order."""

    classes: list[list[str]]  # B lists of k names
    probabilities: Tensor  # (B, k) float32


class ImageModel(nn.Module):
    """An encoder or classifier with the preprocessing of its training, in evaluation mode and without gradients.

    `network` is timm's VisionTransformer. `classes` are the names of its classes in the order of its logits, empty
    where it has no classifier. Inputs are normalised images (B, C, H, W), or pictures: files and PIL images.
    """

    def __init__(self, cfg: DictConfig, pretrained: PretrainedWeights):
        """`cfg` has the groups `model` and `data`. Raises UserError where the weights do not belong to the model."""
        super().__init__()
        self.kind, self.name, self.head_difference = pretrained.kind, pretrained.path, pretrained.head_difference
        self.network = load_network(cfg, pretrained)
        head = pretrained.decode_head
        self.classes = class_names(pretrained, head.classes if head else self.network.num_classes)
        self.prepare = call(Prepare, cfg.data)
        self.crop = call(CenterCrop, {"img_size": cfg.model.img_size, "crop_fraction": cfg.data.crop_fraction})
        self.data = cfg.data
        self.requires_grad_(False).eval()

    # ------------------------------------------------------------ preprocessing

    def pixels(self, picture: Picture) -> Tensor:
        """A picture decoded, resized and cropped at the centre as in evaluation: (C, H, W), not normalised yet.

        Raises UserError where it cannot be read.
        """
        return self.decoded(picture, self.crop)

    def decoded(self, picture: Picture, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """`transform` of a picture (C, H, W) as a source has it. Raises UserError where it cannot be read."""
        decoder = decoder_of(self.data)
        try:
            if not isinstance(picture, Image.Image):
                return transform(decoder(read(os.path.expanduser(os.fspath(picture)))))
            if isinstance(decoder, Decoder):
                return transform(decoder.of_pillow(picture))
        except FAILURES as error:
            name = "the image" if isinstance(picture, Image.Image) else os.fspath(picture)
            raise UserError(f"{name} cannot be used: {reason(error)}.") from error
        raise UserError(f"data.name={self.data.name} reads files of its own: give the path of one.")

    def preprocess(self, picture: Picture) -> Tensor:
        """A picture as the network takes it: (C, H, W) float32, cropped at the centre and normalised."""
        return self.normalised(self.pixels(picture)[None])[0]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) as a loader gives them, normalised, in the type and on the device of the weights."""
        weight = next(self.network.parameters())
        return self.prepare(pixels.to(weight.device)).to(weight.dtype)

    def batch(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """Normalised images (B, C, H, W) of what `embed` and `predict` take; a single image has B = 1."""
        weight = next(self.network.parameters())
        if isinstance(images, Tensor):
            return (images[None] if images.ndim == 3 else images).to(weight)
        pictures = [images] if isinstance(images, str | os.PathLike | Image.Image) else images
        return torch.stack([self.preprocess(picture) for picture in pictures]).to(weight)

    # ------------------------------------------------------------ results

    @torch.no_grad()
    def embed(
        self,
        images: Tensor | Picture | Sequence[Picture],
        pooling: Pooling = "avg",
        layer: int | None = None,
    ) -> Tensor:
        """Features (B, D) of images; with `patches` (B, L, D), a row for each patch in reading order.

        `avg` is the mean of the patch tokens, `token` the class token. `layer` null: after the network's last norm, as
        a classifier's head would get them. A number: the output of that block as it is; 0 is the first, -1 the last.
        Raises UserError for a layer or token that the network does not have.
        """
        self.check("pooling", pooling, "layer", layer)
        network, x = self.network, self.batch(images)
        if layer is None:
            tokens = network.forward_features(x)
            pooled = network.fc_norm(self._pooled(tokens, pooling))
        else:
            pooled = self._pooled(block_output(network, x, layer), pooling)
        return as_float(pooled)

    def check(self, pooling_key: str, pooling: Pooling, layer_key: str, layer: int | None) -> None:
        """Raises UserError for a layer or a token that the network does not have."""
        depth = len(self.network.blocks)
        if layer is not None and not -depth <= layer < depth:
            raise UserError(
                f"{layer_key}={layer} is none of the {depth} blocks: {-depth} to {depth - 1}, or "
                f"{'null' if '.' in layer_key else 'None'} for the output of the last norm."
            )
        if pooling == "token" and not self.network.num_prefix_tokens:
            raise UserError(f"{self.name} ({self.kind}) has no class token: choose {pooling_key}=avg or patches.")

    def _pooled(self, tokens: Tensor, pooling: Pooling) -> Tensor:
        if pooling == "token":
            return tokens[:, 0]
        patches = tokens[:, self.network.num_prefix_tokens :]
        return patches.mean(1) if pooling == "avg" else patches

    @torch.no_grad()
    def logits(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """Logits (B, classes). Raises UserError where the network has no classifier."""
        self.need_classes()
        return self.network(self.batch(images))

    def predict(self, images: Tensor | Picture | Sequence[Picture], k: int = 5) -> Predictions:
        """The `k` most probable classes of each image, or all where there are fewer."""
        return self.named(*self.top(self.logits(images), k))

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Numbers (B, k) of the most probable classes and their probabilities, in falling order."""
        probabilities, classes = logits.float().softmax(1).topk(min(k, logits.shape[1]), dim=1)
        return classes.cpu(), probabilities.cpu()

    def named(self, classes: Tensor, probabilities: Tensor) -> Predictions:
        return Predictions([[self.classes[number] for number in row] for row in classes.tolist()], probabilities)

    def need_classes(self) -> None:
        """Raises UserError where the network has no classifier."""
        if self.network.num_classes:
            return
        why = self.head_difference or "it has no classes"
        raise UserError(
            f"{self.name} ({self.kind}) predicts no labels: {why}. Fine-tune it (task=finetune init={self.name}) or "
            "take its features (task=embed)."
        )


def load_network(cfg: DictConfig, pretrained: PretrainedWeights) -> VisionTransformer:
    """The classifier or segmenter in a checkpoint, or its encoder, whose output is every token after `norm`."""
    if pretrained.decode_head is not None:
        return load_segmenter(cfg, pretrained)
    if pretrained.head is not None and not pretrained.head_difference:
        return load_classifier(cfg, pretrained, pretrained.head.classes)
    network = call(classifier, cfg.model, num_classes=0, drop_path=0.0, global_pool="")
    load_pretrained(network, pretrained, head="fresh", trained=False)
    return network.eval()


def load_classifier(cfg: DictConfig, pretrained: PretrainedWeights, classes: int) -> VisionTransformer:
    """The classifier in a checkpoint, with as many classes as it has. Raises UserError where there is none."""
    head = pretrained.head
    count, pool = (head.classes, "" if head.queries else head.pool) if head else (max(classes, 1), "avg")
    model = call(classifier, cfg.model, num_classes=count, drop_path=0.0, global_pool=pool)
    if head is not None and head.batch_norm:
        add_probe(model, count, head.queries, head.projection, head.layer)
    load_pretrained(model, pretrained, head="require")
    return model.eval()


def class_names(pretrained: PretrainedWeights, count: int) -> list[str]:
    """Names of `count` classes: as the files beside the weights say, of ImageNet-1k as WordNet ids, else numbers."""
    stated = pretrained.meta.classes
    if len(stated) == count:
        return stated
    return list(synsets()) if count == 1000 else [str(number) for number in range(count)]
