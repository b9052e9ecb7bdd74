"""Whether the decoder of a file was trained to predict what a model is to predict."""

from mae.models.mae import MaskedAutoencoder
from mae.models.targets import PixelTarget
from mae.weights.read import PretrainedWeights


def target_difference(model: MaskedAutoencoder, pretrained: PretrainedWeights) -> str:
    """What the file's decoder predicts and what the model is to predict, in words; empty where nothing says it differs.

    A target that is fitted to training images counts as another: it is fitted anew when training starts.
    """
    ours, theirs = getattr(model.target, "settings", {}), pretrained.target or {}
    for key in sorted(ours.keys() & theirs.keys(), key=lambda key: key != "name"):  # its name first
        if ours[key] != theirs[key]:
            full = "target" if key == "name" else f"target.{key}"
            return f"predicts {full}={theirs[key]}, and the model's {full}={ours[key]}"
    if isinstance(model.target, PixelTarget) and pretrained.norm_pix_loss not in (None, model.norm_pix_loss):
        values = pretrained.norm_pix_loss, model.norm_pix_loss
        was, is_now = (f"task.norm_pix_loss={str(value).lower()}" for value in values)
        return f"was trained with {was}, and this run has {is_now}"
    if theirs and model.target.fit_images is not None:
        return f"predicts target={theirs['name']} as it was fitted then, and this run fits it anew"
    return ""
