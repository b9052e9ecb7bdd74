"""RankMe (Garrido et al., arXiv 2210.02885): how many dimensions the features of a network use, without labels."""

import logging
import math

import numpy as np
import torch
from torch import Tensor

from mae.device import exact
from mae.distributed.ranks import Ranks

log = logging.getLogger(__name__)

EPSILON = 1e-7  # section 3.1, for features in float32


def effective_rank(feature: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values of features (N, D), in float64 (equation 1).

    Between 1 and min(N, D), but for EPSILON. NaN where a feature is not finite.
    """
    if not feature.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(feature.double())
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + EPSILON  # all features may be 0
    return float(torch.exp(-(shares * shares.log()).sum()))


class RankMe:
    """Collects the features of `images` validation images, spread evenly, batch by batch on the host.

    The paper takes 25,600 images. Fewer than the features' width bound the result.
    """

    def __init__(self, images: int, num_validation: int, width: int):
        count = min(images, num_validation)
        self.chosen = torch.zeros(num_validation, dtype=torch.bool)
        self.chosen[np.arange(count) * num_validation // max(1, count)] = True
        self.width = width
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []
        if count < width:
            log.warning("task.rankme: %d validation images bound the rank of features %d wide", count, width)

    def add(self, sample_index: Tensor, feature: Tensor) -> None:
        """sample_index (B,) int64 and feature (B, D) of a batch."""
        sample_index = sample_index.cpu()
        wanted = self.chosen[sample_index]
        self.rows.append((sample_index[wanted].numpy(), feature.float().cpu()[wanted].numpy()))

    def result(self, ranks: Ranks) -> dict[str, float]:
        """`val/rankme` over all ranks, the same on each; nothing where there was no image. Forgets the features."""
        index, feature = np.zeros(0, np.int64), np.zeros((0, self.width), np.float32)
        together = [(index, feature), *(row for rows in ranks.gather(self.rows) for row in rows)]
        self.rows = []
        index, feature = (np.concatenate(columns) for columns in zip(*together, strict=True))
        if not len(index):
            return {}
        ordered = feature[np.argsort(index)]  # the same on any number of ranks
        return {"val/rankme": effective_rank(torch.from_numpy(ordered).to(exact(ranks.device)))}
