"""Pretrained weights for other channels and patches than they were trained with: the first layer is computed anew."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor

from mae.errors import UserError
from mae.weights.layouts import DECODER
from mae.weights.read import PretrainedWeights
from mae.weights.sizes import Sizes

FIRST = "patch_embed.proj.weight"  # (D, C, p, p)


@dataclass(frozen=True)
class Adaptation:
    """What may be changed in the first layer; None: nothing, and another size is refused."""

    channels: Literal["mean"] | list[list[int]] | None = None  # of the file, for each of the model's channels
    patch_size: Literal["resize"] | None = None

    def hint(self, differing: list[str]) -> str:
        """A sentence on the keys that would take weights of other sizes; "" where none would."""
        keys = {"in_chans": "task.init_channels=mean", "patch_size": "task.init_patch_size=resize"}
        typed = [keys[key] for key in differing if key in keys]
        if not typed or len(typed) < len(differing):
            return ""
        return f" To go on from it with the model's own, set {' '.join(typed)}: its first layer is then computed anew."


def adapted(pretrained: PretrainedWeights, ours: Sizes, adaptation: Adaptation) -> PretrainedWeights:
    """The weights with a first layer of the model's channels and patches, as far as `adaptation` allows.

    Then a decoder is left out, since it predicts the values of other patches.
    Raises UserError where `channels` do not belong to the file or the model.
    """
    weight, notes = pretrained.state[FIRST], []
    theirs = pretrained.sizes
    if adaptation.channels is not None and (
        isinstance(adaptation.channels, list) or theirs["in_chans"] != ours["in_chans"]
    ):
        groups = groups_of(adaptation.channels, theirs["in_chans"], ours["in_chans"])
        weight = inflated(weight, groups)
        how = "the mean of all" if adaptation.channels == "mean" else f"{groups}"
        notes.append(
            f"Its first layer for {theirs['in_chans']} channels was taken for {ours['in_chans']}, each from {how} of "
            "its own (task.init_channels)."
        )
    new = ours["patch_size"]
    if adaptation.patch_size is not None and theirs["patch_size"] != new:
        weight = resample_patch_embed(weight.float(), new)
        notes.append(
            f"Its first layer was resized from patches of {_by(theirs['patch_size'])} to {_by(new)} pixels by the "
            "pseudo-inverse (task.init_patch_size)."
        )
    if not notes:
        return pretrained
    patch = pretrained.position_patch or theirs["patch_size"]
    state = {name: tensor for name, tensor in pretrained.state.items() if not name.startswith(DECODER)}
    state[FIRST] = weight
    return replace(pretrained, state=state, notes=[*pretrained.notes, *notes], position_patch=patch)


def groups_of(channels: Literal["mean"] | list[list[int]], theirs: int, ours: int) -> list[list[int]]:
    """For each of our channels the file's that it stands for. Raises UserError where numbers do not fit."""
    if channels == "mean":
        return [list(range(theirs))] * ours
    assert isinstance(channels, list)
    if len(channels) != ours:
        raise UserError(
            f"task.init_channels has {len(channels)} groups, and the model {ours} channels (data.in_chans): give a "
            "list of the file's channels for each, as [[0],[1],[2],[0,1,2]]."
        )
    if wrong := [number for group in channels for number in group if not 0 <= number < theirs]:
        raise UserError(
            f"task.init_channels names channel {wrong[0]}, and the first layer of init= has channels 0 to {theirs - 1}."
        )
    return channels


def inflated(weight: Tensor, groups: list[list[int]]) -> Tensor:
    """A first layer (D, C, p, p) for as many channels as there are groups: each is the sum over its group.

    A channel of the file is divided by the number of groups that name it. So where every channel is named, an image
    whose channels are all equal gives the same tokens as before. An empty group is a channel of zeros.
    """
    shares = torch.zeros(len(groups), weight.shape[1], dtype=torch.float64)
    for number, group in enumerate(groups):
        shares[number, group] = 1.0
    shares /= shares.sum(0).clamp(min=1.0)
    return torch.einsum("nc,dchw->dnhw", shares, weight.double()).float()


def _by(size: list[int]) -> str:
    return " x ".join(map(str, size))
