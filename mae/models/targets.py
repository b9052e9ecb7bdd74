"""The targets: pixels, principal components, oriented gradients, features of a teacher, token ids.

A target is a subclass of `Target` and its entry in `TARGETS`. Its keyword-only settings stand in conf/target/NAME.yaml.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae.device import exact
from mae.errors import UserError
from mae.models import renderings
from mae.models.target import Patches, Target
from mae.models.teacher import Teacher
from mae.models.tokenizer import described, open_tokenizer


class PixelTarget(Target):
    """The pixels of a patch; with `norm_pix_loss` less their mean, over their deviation (paper, section 3)."""

    def __init__(self, patches: Patches):
        super().__init__(patches)
        if patches.norm_pix_loss and patches.values < 2:
            raise UserError("task.norm_pix_loss needs patches of more than one value: raise model.patch_size.")
        self.size = patches.values

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        if not self.patches.norm_pix_loss:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as the reference's
        return (patches - mean) / (var + 1e-6).sqrt()

    def to_pixels(self, pred: Tensor, patches: Tensor) -> Tensor:
        """A normalised prediction has no brightness or contrast of its own: it gets those of the original patch, as in
        the paper's figures."""
        if not self.patches.norm_pix_loss:
            return pred
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return pred * (var + 1e-6).sqrt() + mean


PATCH_SUMS = "patch_sums.npz"  # of a run of task=stats
SUMS_OF = ("patch_size", "img_size", "in_chans")  # what sums of patches belong to


def product_sums(patches: Tensor) -> Tensor:
    """The sum of [1, patch] times [1, patch] over patches (b, L, p * p * C), in float64, on a device that has it."""
    rows = F.pad(patches.to(exact(patches.device)).double().flatten(0, 1), (1, 0), value=1.0)
    return rows.T @ rows


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Within, products are not computed in half precision. A plan's tensors, on `meta`, know no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class PcaTarget(Target):
    """The first coefficients of a patch in the principal components of all patches (paper, table 1d)."""

    mean: Tensor  # (p * p * C,)
    basis: Tensor  # (components, p * p * C), orthonormal rows

    def __init__(
        self,
        patches: Patches,
        *,
        components: Annotated[int, "[1, inf)"],
        images: Annotated[int, "[1, inf)"] | None,
        fitted: str | None,
    ):
        super().__init__(patches)
        if components > patches.values:
            raise UserError(
                f"target.components={components} is more than the {patches.values} values of a patch: lower it."
            )
        self.size, self.fit_images, self.fitted = components, images or np.iinfo(np.int64).max, fitted
        self.register_buffer("mean", torch.zeros(patches.values))
        self.register_buffer("basis", torch.zeros(components, patches.values))

    def estimate(self, patches: Iterable[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Sums of patches and of their products in one pass, in float64."""
        size = self.patches.values
        sums = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        for batch in patches:
            of_batch = product_sums(batch)
            sums = sums.to(of_batch.device) + of_batch
        self._fit(total(sums.to(exact(self.mean.device))).cpu())

    def fit_from_file(self) -> bool:
        """From the sums of a run of task=stats. They are of values in [0, 1], and are turned into those of values as
        the encoder sees them: an affine function of each channel."""
        if self.fitted is None:
            return False
        sums = self._read_sums(Path(self.fitted).expanduser())
        zeros = self.mean.new_zeros(1, self.patches.in_chans, 1, 1)
        mean = self.patches.undo(zeros).cpu().double().flatten()
        std = self.patches.undo(zeros + 1).cpu().double().flatten() - mean
        pixels = self.patches.size[0] * self.patches.size[1]
        affine = torch.diag(torch.cat([torch.ones(1, dtype=torch.float64), (1 / std).repeat(pixels)]))
        affine[0, 1:] = (-mean / std).repeat(pixels)
        self._fit(affine.T @ sums @ affine)
        return True

    def _read_sums(self, path: Path) -> Tensor:
        """The sums (1 + p * p * C, 1 + p * p * C) of a file or of a run's directory."""
        file = path / PATCH_SUMS if path.is_dir() else path
        try:
            with np.load(file) as content:
                sums, stored = torch.from_numpy(content["sums"]), {key: content[key].tolist() for key in SUMS_OF}
        except Exception as error:  # of many kinds, by what is damaged
            raise UserError(
                f"target.fitted={self.fitted} holds no sums of patches: name a run of task=stats target=pca."
            ) from error
        (height, width), (rows, columns) = self.patches.size, self.patches.grid
        wanted = {
            "patch_size": [height, width],
            "img_size": [rows * height, columns * width],
            "in_chans": self.patches.in_chans,
        }
        for key, value in wanted.items():
            if stored[key] != value:
                raise UserError(
                    f"target.fitted={self.fitted} is of model.{key}={stored[key]}, and this model has {value}: run "
                    "task=stats target=pca with the sizes of this one."
                )
        return sums

    def _fit(self, sums: Tensor) -> None:
        """Sets mean and basis. The largest entry of each component is positive, as scikit-learn has it."""
        count, first = sums[0, 0], sums[0, 1:]
        covariance = (sums[1:, 1:] - first[:, None] * first / count) / (count - 1)
        basis = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[: self.size]
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        self.mean.copy_(first / count)
        self.basis.copy_(basis * largest.sign())

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        with full_precision(patches.device):
            return (patches - self.mean) @ self.basis.T

    def to_pixels(self, pred: Tensor, patches: Tensor) -> Tensor:
        """What the coefficients say of the pixels."""
        with full_precision(pred.device):
            return pred.to(self.basis.dtype) @ self.basis + self.mean


class HogTarget(Target):
    """Histograms of oriented gradients (MaskFeat, arXiv 2112.09133, section 3; its code's HOGLayerC).

    For each cell and channel a histogram of unsigned orientations, weighed by the gradient's size and of length 1.
    Gradients are Sobel's, on images as they are normalised: mean and deviation of a channel change no histogram.
    """

    def __init__(self, patches: Patches, *, orientations: Annotated[int, "[2, inf)"], cell: Annotated[int, "[1, inf)"]):
        super().__init__(patches)
        height, width = patches.size
        if height % cell or width % cell:
            raise UserError(f"target.cell={cell} does not divide a patch of {height} x {width} pixels: choose another.")
        self.orientations, self.cell = orientations, cell
        self.cells = height // cell, width // cell  # of a patch
        self.size = self.cells[0] * self.cells[1] * patches.in_chans * orientations

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        """(B, L, size): values in the order cell's row, cell's column, channel, orientation."""
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        down = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
        across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
        dx = down[..., :-2] - down[..., 2:]  # differences, and no convolution: exactly 0 where an image is flat
        dy = across[:, :, :-2] - across[:, :, 2:]
        angle = torch.atan2(dx, dy) * (self.orientations / math.pi)
        bins = angle.floor().remainder(self.orientations)
        strength = (dx**2 + dy**2).sqrt()
        counts = [self._by_cell(strength * (bins == k)) for k in range(self.orientations)]
        histogram = F.normalize(torch.stack(counts, -1), dim=-1)  # (B, C, rows of cells, columns of cells, n)
        split = histogram.unflatten(3, (-1, self.cells[1])).unflatten(2, (-1, self.cells[0]))
        return split.permute(0, 2, 4, 3, 5, 1, 6).flatten(3).flatten(1, 2)

    def _by_cell(self, values: Tensor) -> Tensor:
        """Sums (B, C, H / cell, W / cell) over cells."""
        return values.unflatten(3, (-1, self.cell)).unflatten(2, (-1, self.cell)).sum((3, 5))

    def pictures(self, target: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
        """A line for each orientation of a cell, along the edge, the brighter the stronger."""
        shape = (*self.patches.grid, *self.cells, self.patches.in_chans, self.orientations)
        cells = [values.float().unflatten(1, shape[:2]).unflatten(3, shape[2:]).mean(5) for values in (target, pred)]
        first, second = (c.transpose(2, 3).flatten(3, 4).flatten(1, 2) for c in cells)
        return renderings.glyphs(first), renderings.glyphs(second)


class FeatureTarget(Target):
    """A frozen teacher's features of the patches of the whole image, normalised without weights.

    The teacher is neither saved nor trained: it is no submodule, and is read again when a run goes on.
    """

    one_size = True
    teacher: Teacher

    def __init__(
        self,
        patches: Patches,
        *,
        teacher: str,
        layer: Annotated[int, "[1, inf)"] | None,
        loss: Literal["cosine", "mse"],
    ):
        super().__init__(patches)
        vars(self)["teacher"] = network = patches.read_teacher(teacher)
        if layer is not None and layer > network.depth:
            raise UserError(
                f"target.layer={layer} is more than the {network.depth} blocks of target.teacher={teacher}."
            )
        self.layer, self.cosine, self.size = layer, loss == "cosine", network.width

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeatureTarget":
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        features = self.teacher(images, self.layer)
        return F.layer_norm(features.to(images.dtype), (self.size,))

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """The squared error, or 1 less the cosine of the angle between both."""
        if self.cosine:
            return 1 - F.cosine_similarity(pred.to(target.dtype), target, dim=-1).mean()
        return F.mse_loss(pred, target)


OUTSIDE = -1  # an id that the vocabulary lacks


class TokenTarget(Target):
    """Token ids of the patches, from a TorchScript or ONNX file that maps images in [0, 1] to ids (B, L)."""

    gives_ids, one_size = True, True

    def __init__(self, patches: Patches, *, file: str, vocabulary: Annotated[int, "[2, inf)"]):
        super().__init__(patches)
        self.file, self.size = Path(file).expanduser(), vocabulary
        self._tokenizer: Callable[[Tensor], object] | None = None  # opened when first needed: plans do without
        # of batches' ids, on their way to the host
        self._ranges: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    @torch.no_grad()
    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        """Ids (B, L) int64; OUTSIDE where the vocabulary lacks one. Raises UserError where the file is none of ids."""
        opened = self._tokenizer is None
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.file, images.device)
        ids = self._tokenizer(self.patches.undo(images).float())
        ids = ids.flatten(1) if isinstance(ids, Tensor) and ids.ndim > 1 else ids
        count = self.patches.grid[0] * self.patches.grid[1]
        if not isinstance(ids, Tensor) or ids.shape != (len(images), count) or ids.is_floating_point():
            raise UserError(
                f"target.file={self.file} gives {described(ids)} for {len(images)} images, and not the whole numbers "
                f"of {count} patches each."
            )
        ids = ids.long()
        self._check_range(ids, wait=opened)
        return ids.where((ids >= 0) & (ids < self.size), OUTSIDE)

    def _check_range(self, ids: Tensor, wait: bool) -> None:
        """Raises UserError where the vocabulary lacks an id; on CUDA, unless `wait`, some batches later.

        No step waits for the GPU then, and the loss of such a batch is NaN.
        """
        copied = torch.cuda.Event() if ids.is_cuda and not wait else None
        extremes = torch.stack(ids.aminmax()).to("cpu", non_blocking=copied is not None)
        if copied is not None:
            copied.record(torch.cuda.current_stream(ids.device))
        self._ranges.append((extremes, copied))
        while self._ranges and ((copied := self._ranges[0][1]) is None or copied.query()):
            low, high = self._ranges.popleft()[0].tolist()
            if low < 0 or high >= self.size:
                raise UserError(
                    f"target.file={self.file} gives ids from {low} to {high}, and target.vocabulary={self.size} allows "
                    f"those from 0 to {self.size - 1}: raise it."
                )

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy; NaN where an id is OUTSIDE, so that the step is skipped."""
        logits, outside = pred.flatten(0, 1), (target == OUTSIDE).any()
        logits = logits.float() if logits.dtype.itemsize == 2 else logits
        loss = F.cross_entropy(logits, target.flatten(), ignore_index=OUTSIDE)
        return loss * torch.where(outside, math.nan, 1.0)

    def pictures(self, target: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
        """A colour for each id; of a prediction for the likeliest."""
        first, second = (renderings.id_colours(ids) for ids in (target, pred.argmax(-1)))
        return renderings.in_grid(first, self.patches.grid), renderings.in_grid(second, self.patches.grid)


TARGETS = {
    "pixels": PixelTarget,
    "pca": PcaTarget,
    "hog": HogTarget,
    "features": FeatureTarget,
    "tokens": TokenTarget,
}
