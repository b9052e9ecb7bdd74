"""Entry point of torch.hub: `torch.hub.load(".", "mae", "RUN", source="local")` in a clone of this repository."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mae.tasks.inference import ImageModel

dependencies = ["torch", "torchvision", "timm", "hydra", "omegaconf", "safetensors", "sklearn"]


def mae(source: str, **settings: object) -> "ImageModel":
    """What `mae.load(source, **settings)` returns: a model with `.preprocess`, `.embed`, `.predict` and `.classes`.

    `source` is a run's directory, a checkpoint, a file of another library, timm:NAME or hf://USER/NAME.
    """
    from mae import load

    return load(source, **settings)
