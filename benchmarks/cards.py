"""Peaks of GPUs: dense bfloat16 products with float32 sums, and memory. From NVIDIA's data sheets and white papers."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """`name` is made of words of the name that the driver gives the GPU."""

    name: str
    tflops: float
    terabytes_s: float
    source: str


# A word more comes before a word less, since the first that matches is taken. Data sheets print rates with sparsity,
# which are twice these
CARDS = [
    Card("H100 PCIe", 756, 2.0, "H100 data sheet, PCIe: 1,513 with sparsity"),
    Card("H100 NVL", 835, 3.9, "H100 data sheet, NVL: 1,671 with sparsity"),
    Card("H100", 989, 3.35, "H100 data sheet, SXM: 1,979 with sparsity"),
    Card("H200 NVL", 835, 4.8, "H200 data sheet, NVL: 1,671 with sparsity"),
    Card("H200", 989, 4.8, "H200 data sheet, SXM: 1,979 with sparsity"),
    Card("A100", 312, 2.04, "A100 data sheet, 80 GB SXM: 624 with sparsity"),
    Card("L40S", 362, 0.864, "L40S data sheet: 733 with sparsity"),
    Card("L4", 121, 0.3, "L4 data sheet: 242 with sparsity"),
    Card("A10", 125, 0.6, "A10 data sheet: 250 with sparsity"),
    Card("RTX 4090", 165, 1.008, "Ada GPU architecture, white paper, appendix: 165.2 with float32 sums"),
]


def card_called(name: str) -> Card | None:
    """The card that the driver calls `name`, such as NVIDIA A100-SXM4-80GB; None for one that is not listed."""
    words = set(re.split(r"[\s-]+", name))
    return next((card for card in CARDS if words.issuperset(card.name.split())), None)
