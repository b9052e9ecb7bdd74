"""Expected speed of a pre-training step on GPUs, computed from operations and bytes. Nothing here is measured.

python benchmarks/roofline.py

prints the tables of docs/gpu.md. Operations of products are counted on the meta device. The bytes of what lies between
them are those that each pass over the tokens reads and writes, per token and channel of a block; see `PASSES`.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from cards import CARDS, Card
from hydra import compose, initialize_config_dir
from peers import MASK_RATIO

from mae.config.check import check_config, resolve
from mae.models.mae import MaskedAutoencoder
from mae.tools.cost import forward_flops
from mae.tools.planned_model import model_on_meta

ROOT = Path(__file__).parents[1]

NOTHING = ["dry_run=true", "device=cpu"]  # no data and no GPU is needed
IMAGES = 512
BANDWIDTH = 0.85  # of the memory's peak that a pass over large tensors reaches
LAUNCH_S = 2e-6  # between two kernels that follow each other
LAUNCHES = 900  # of a compiled step: 20 blocks, and what is before, between and after
EMBEDDINGS = 40  # bytes a token and channel: position and mask tokens, the two embeddings, the last norms, both ways
PIXELS = (
    34  # bytes a value of an image: bytes to floats, normalised, patches, their statistics, the loss and its gradient
)
WEIGHTS = 40  # bytes a weight: AdamW reads 16 and writes 12; bf16 copies of weights and float32 gradients 12

# Bytes a token and channel of a block, float32 residual stream and bf16 products: what is read, what is written
PASSES = {
    "first norm": 4 + 2,
    "first residual sum and second norm": 2 + 4 + 4 + 2,
    "GELU, four times as wide": 8 + 8,
    "second residual sum": 2 + 4 + 4,
    "gradient of GELU, and GELU again": 8 + 8 + 8 + 8 + 8,
    "gradients of both norms": 2 * (2 + 4 + 4 + 4 + 2),
    "both norms again": 2 * (4 + 2),
    "sums for gradients of biases": 6 + 2 + 8 + 2,
}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the peak, and bytes a token and channel of a block."""

    products: float = 0.70
    attention: float = 0.25
    block_bytes: int = sum(PASSES.values())
    fused_embeddings: float = 1.0  # share of the passes outside of blocks that is left


STEPS = {
    "blocks compiled": {},
    "the whole forward compiled": {"block_bytes": -4 - 8, "fused_embeddings": 0.5},  # norms with the sum before them
    "bf16 residual stream": {"block_bytes": -4 - 22},  # two bytes less in each pass over it
    "GELU in the product's epilogue": {"block_bytes": -16},
    "products at 78 %, attention at 40 %": {"products": 0.78, "attention": 0.40},
}


def cumulative() -> dict[str, Assumptions]:
    """The assumptions after each change, one upon the other."""
    now, rows = Assumptions(), {}
    for name, changes in STEPS.items():
        values = {k: now.block_bytes + v if k == "block_bytes" else v for k, v in changes.items()}
        now = rows[name] = replace(now, **values)
    return rows


@functools.cache  # of a model on each card, after each change
def operations(model: MaskedAutoencoder) -> int:
    """Of products in a forward pass of one image."""
    return forward_flops(model, MASK_RATIO).total


def seconds(model: MaskedAutoencoder, card: Card, images: int, a: Assumptions) -> tuple[float, float, float]:
    """Seconds of a step in (products and attention, passes over the tokens in blocks, all else)."""
    visible, tokens = 1 + int(model.num_patches * (1 - MASK_RATIO)), 1 + model.num_patches
    width, narrow = model.pos_embed.shape[-1], model.decoder_pos_embed.shape[-1]
    encoder, decoder = len(model.blocks), len(model.get_submodule("decoder_blocks")._modules)
    scores = 4 * (encoder * visible**2 * width + decoder * tokens**2 * narrow)  # operations of attention, forward
    attention = 3.5 * scores * images / (a.attention * card.tflops * 1e12)  # backward computes the scores again
    products = 3 * (operations(model) - scores) * images / (a.products * card.tflops * 1e12)
    rate = BANDWIDTH * card.terabytes_s * 1e12
    values = images * (encoder * visible * width + decoder * tokens * narrow)
    outside = EMBEDDINGS * images * (visible * width + tokens * narrow) + PIXELS * images * 3 * 224 * 224
    weights = WEIGHTS * sum(p.numel() for p in model.parameters())
    rest = (a.fused_embeddings * outside + weights) / rate + LAUNCHES * LAUNCH_S
    return products + attention, values * a.block_bytes / rate, rest


def mfu(model: MaskedAutoencoder, card: Card, images_s: float) -> float:
    return 3 * operations(model) * images_s / (card.tflops * 1e12)


def on_meta(name: str) -> MaskedAutoencoder:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        model = model_on_meta(check_config(resolve(compose("config", [f"model={name}", "data=imagenet", *NOTHING]))))
    assert isinstance(model, MaskedAutoencoder)
    return model


def main() -> None:
    base, card = on_meta("vit_base"), next(card for card in CARDS if card.name == "H100")
    print(f"ViT-B/16, {IMAGES} images, {card.name}: {card.tflops:g} TFLOP/s, {BANDWIDTH * card.terabytes_s:.2f} TB/s\n")
    print("| cumulative change | products, attention ms | passes ms | rest ms | step ms | images/s | MFU |")
    print("|---|---|---|---|---|---|---|")
    for name, assumptions in cumulative().items():
        times = seconds(base, card, IMAGES, assumptions)
        rate = IMAGES / sum(times)
        cells = " | ".join(f"{1e3 * t:.1f}" for t in (*times, sum(times)))
        print(f"| {name} | {cells} | {rate:,.0f} | {mfu(base, card, rate):.2f} |")
    best = list(cumulative().values())[1]
    names = ("vit_small", "vit_base", "vit_large", "vit_huge")
    models = [on_meta(name) for name in names]
    print(f"\nImages/s of a GPU, the whole forward compiled, {IMAGES} images at a time (MFU)\n")
    print(f"| card | TFLOP/s | TB/s | {' | '.join(names)} | source of the peak |")
    print("|---|---|---|---|---|---|---|---|")
    for card in CARDS:
        rates = [IMAGES / sum(seconds(model, card, IMAGES, best)) for model in models]
        cells = [f"{rate:,.0f} ({mfu(model, card, rate):.2f})" for model, rate in zip(models, rates, strict=True)]
        print(f"| {card.name} | {card.tflops:g} | {card.terabytes_s:g} | {' | '.join(cells)} | {card.source} |")


if __name__ == "__main__":
    main()
