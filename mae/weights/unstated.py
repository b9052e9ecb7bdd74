"""What no tensor of a file tells: its number of heads, and how its training's images were normalised."""

import logging

from mae.errors import UserError
from mae.weights.export_state import TIMM_NAMES
from mae.weights.preprocessing import IMAGENET, Preprocessing
from mae.weights.read import PretrainedWeights

log = logging.getLogger(__name__)


def number_of_heads(pretrained: PretrainedWeights, advice: str) -> int:
    """As the files beside the tensors say, or with a warning that of timm's models of these sizes.

    Raises UserError, with `advice` on what to type, where neither tells.
    """
    sizes = pretrained.sizes
    if "num_heads" in sizes:
        return sizes["num_heads"]
    known = (sizes["patch_size"][0], sizes["embed_dim"], sizes["depth"])
    heads = next((key[3] for key in TIMM_NAMES if key[:3] == known), None)
    if heads is None:
        raise UserError(f"{pretrained} does not say its number of heads: {advice}.")
    log.warning("%s: taken to have %s heads, as timm's models of its sizes", pretrained, heads)
    return heads


def normalisation(pretrained: PretrainedWeights, top: float | None, advice: str) -> dict[str, list[float]]:
    """`mean` and `std` for images that are divided by `top`: as stated, or with a warning ImageNet's.

    Raises UserError, with `advice` on what to type, where neither is of the network's channels.
    """
    stated, channels = pretrained.preprocessing, pretrained.sizes["in_chans"]
    if stated is None:
        if channels != len(IMAGENET[0]):
            raise UserError(f"{pretrained} does not say how its {channels} channels were normalised: {advice}.")
        log.warning("%s does not say how images were normalised: by ImageNet's mean and std, it is assumed", pretrained)
        stated = Preprocessing(*IMAGENET)
    for key in ("mean", "std"):
        if (count := len(getattr(stated, key))) not in (1, channels):
            raise UserError(f"{pretrained} has {channels} channels, and states a {key} of {count} values: {advice}.")
    return stated.of_images_up_to(top)
