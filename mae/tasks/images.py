"""Pictures of what a model sees and makes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae.models.mae import MaskedAutoencoder
from mae.runs.files import replacing


def reconstruction_rows(model: MaskedAutoencoder, images: Tensor, pred: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Normalised images (B, C, H, W) with predictions (B, L, p * p * C) and mask (B, L) as four rows.

    With norm_pix_loss a prediction has no brightness or contrast of its own: each patch gets those of the
    original, as the paper's figures do.
    """
    patches = model.patchify(images)
    pixels = model.target.to_pixels(pred, patches)
    assert pixels is not None
    removed = mask[..., None].bool()
    grey = torch.zeros_like(patches)  # the data's mean colour
    return {
        "original": images,
        "masked": model.unpatchify(torch.where(removed, grey, patches)),
        "reconstruction": model.unpatchify(pixels.to(patches.dtype)),
        "with visible": model.unpatchify(torch.where(removed, pixels.to(patches.dtype), patches)),
    }


def to_image(values: Tensor) -> Image.Image:
    """Values (C, H, W) in [0, 1] as a picture: three channels as RGB, any other number as the mean's grey."""
    if values.shape[0] != 3:
        values = values.mean(0, keepdim=True).expand(3, -1, -1)
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def save_rows(rows: Mapping[str, Tensor], path: Path, smallest: int = 96) -> None:
    """Writes rows of images (B, C, H, W) in [0, 1], one below the other as a PNG, a title before each.

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
            cell = to_image(images[column]).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(cell, (margin + column * (cell_w + gap), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        sheet.save(temporary)
