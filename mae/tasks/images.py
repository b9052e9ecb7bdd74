"""Pictures of what a model sees and makes."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae.models.mae import MaskedAutoencoder
from mae.runs.files import replacing


def reconstruction_rows(
    model: MaskedAutoencoder, images: Tensor, pred: Tensor, mask: Tensor, undo: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Normalised images (B, C, H, W) with predictions (B, L, size) and mask (B, L) as rows of images in [0, 1].

    `undo` takes normalised images to [0, 1]. Where the target has no pixels, targets and predictions are drawn as it
    draws them.
    """
    patches = model.patchify(images)
    removed = mask[..., None].bool()
    grey = torch.zeros_like(patches)  # the data's mean colour
    rows = {"original": images, "masked": model.unpatchify(torch.where(removed, grey, patches))}
    pixels = model.target.to_pixels(pred, patches)
    if pixels is not None:
        pixels = pixels.to(patches.dtype)
        rows["reconstruction"] = model.unpatchify(pixels)
        rows["with visible"] = model.unpatchify(torch.where(removed, pixels, patches))
    rows = {title: undo(row.float()) for title, row in rows.items()}
    if pixels is None:
        with torch.no_grad():
            rows["target"], rows["prediction"] = model.target.pictures(model.target(images, patches), pred)
    return rows


def to_image(values: Tensor) -> Image.Image:
    """Values (C, H, W) in [0, 1] as a picture: three channels as RGB, any other number as the mean's grey."""
    if values.shape[0] != 3:
        values = values.mean(0, keepdim=True).expand(3, -1, -1)
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def save_rows(rows: Mapping[str, Tensor], path: Path, smallest: int = 96) -> None:
    """Writes rows of images (B, C, H, W) in [0, 1], one below the other as a PNG, a title before each.

    All rows are shown in the size of the first.
    Small images are enlarged by a whole factor to `smallest` pixels or more, without blurring.
    """
    first = next(iter(rows.values()))
    count, _, height, width = first.shape
    zoom = max(1, -(-smallest // max(height, width)))
    cell_w, cell_h, gap, margin = width * zoom, height * zoom, 4, 100
    sheet = Image.new("RGB", (margin + count * (cell_w + gap), gap + len(rows) * (cell_h + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (title, images) in enumerate(rows.items()):
        top = gap + row * (cell_h + gap)
        pen.text((4, top + cell_h // 2 - 8), title, fill="black", font=font)
        for column in range(count):
            picture = to_image(images[column])
            larger = picture.width > cell_w or picture.height > cell_h  # as lines are, which need all their pixels
            cell = picture.resize((cell_w, cell_h), Image.Resampling.BOX if larger else Image.Resampling.NEAREST)
            sheet.paste(cell, (margin + column * (cell_w + gap), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        sheet.save(temporary)
