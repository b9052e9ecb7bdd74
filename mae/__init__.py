"""Masked autoencoders (arXiv 2111.06377): an experiment framework."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mae.tasks.inference import ImageModel


def load(source: str | os.PathLike[str], **settings: object) -> "ImageModel":
    """The model of a run, a checkpoint or a file, in evaluation mode, with its preprocessing and its classes.

    `source` is what `init=` takes: a run's directory (its newest checkpoint), `RUN/checkpoints/best`, a file of another
    library, `timm:NAME`, `hf://USER/NAME` or `wandb:ENTITY/PROJECT/ARTIFACT`. Sizes, normalisation and crop are those
    of the run, or what the file states; `settings` override them, such as `num_heads=12` or `mean=[0.5, 0.5, 0.5]`.

    `.preprocess(picture)` gives a normalised image (C, H, W). `.embed(pictures, pooling, layer)` gives features (B, D).
    `.predict(pictures, k)` gives classes and probabilities, and `.classes` the names in the order of the logits. Of a
    segmenter `.predict(pictures)` gives a map (H, W) uint8 of each picture's size: the class of each pixel.

    Raises UserError where the source cannot be read or does not say what is needed.
    """
    from mae.tasks.load_model import load_model

    return load_model(os.fspath(source), settings)
