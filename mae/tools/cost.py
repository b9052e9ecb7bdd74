"""Estimates of a run's time and cost, from its operations and a rate. Computed, not measured."""

import functools
import time
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from mae.models.mae import MaskedAutoencoder
from mae.models.masking import count_visible
from mae.models.segmenter import Segmenter
from mae.models.target import ShapesOnly
from mae.models.vit import Classifier, encoder_sizes
from mae.plan import Plan
from mae.tools.bottlenecks import HostWork

SIDE = {"cpu": 1024, "mps": 2048, "cuda": 8192}  # of the products that are timed: large enough to fill the device


class Cost(NamedTuple):
    """An estimate of a run's time."""

    rows: dict[str, str]  # of a plan
    seconds: float


class Flops(NamedTuple):
    """Operations of one image's forward pass, two a multiply-add; training takes three times that."""

    encoder: int
    decoder: int
    target: int = 0  # what is predicted, of which there is no backward pass

    @property
    def total(self) -> int:
        return self.encoder + self.decoder + self.target


def forward_flops(
    model: MaskedAutoencoder | VisionTransformer, mask_ratio: float | None, predict_ratio: float | None = None
) -> Flops:
    """Matrix products of a model on the meta device: of an autoencoder, of a classifier without its head, or of a
    segmenter, whose head is counted as a decoder."""
    sizes = encoder_sizes(model)
    images = torch.empty(1, sizes.in_chans, *sizes.img_size, device="meta")
    if isinstance(model, Segmenter):
        of_encoder = _count(lambda: model.features(images))
        return Flops(of_encoder, _count(lambda: model(images)) - of_encoder)
    if not isinstance(model, MaskedAutoencoder):
        tokens = model.head_tokens if isinstance(model, Classifier) else model.forward_features
        return Flops(_count(lambda: tokens(images)), 0)
    assert mask_ratio is not None
    order = torch.empty(1, model.num_patches, dtype=torch.int64, device="meta")
    patches = torch.empty(*order.shape, model.patch_values, device="meta")
    visible = count_visible(model.num_patches, mask_ratio)
    encoder = _count(lambda: model.encode_masked(patches[:, :visible], order))
    target, model.target = model.target, ShapesOnly(model.target)
    try:
        whole = _count(lambda: model(images, mask_ratio, predict_ratio=predict_ratio))
    finally:
        model.target = target
    # a tokenizer's own operations are not known before its file is opened
    of_target = 0 if target.gives_ids else _count(lambda: target(images, patches))
    return Flops(encoder, whole - encoder, of_target)


def _count(forward: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


def estimate_cost(
    plan: Plan,
    operations: int,
    machines: int,
    device: torch.device,
    dtype: torch.dtype,
    host: HostWork,
    *,
    tflops: Annotated[float, "(0, inf)"] | None,
    utilisation: Annotated[float, "(0, 1]"],
    loader_images_per_second: Annotated[float, "(0, inf)"] | None,
    cost_per_hour: Annotated[float, "[0, inf)"] | None,
) -> Cost:
    """Time and cost, from the `operations` of a training image, and on a GPU what may hold it back.

    `tflops` is the rate of one device in matrix products, measured here where null. A step reaches the share
    `utilisation` of it. A rate measured on a CPU is that of the whole machine, however many processes share it.
    `loader_images_per_second` is what the workers of one machine deliver.
    """
    rate, source = (tflops, "given") if tflops else (matrix_rate(device, dtype) / 1e12, f"measured on this {device}")
    images, count = plan.images_seen(plan.steps), machines if device.type == "cpu" and not tflops else plan.devices
    of_device = rate * 1e12 * utilisation / operations  # images a second
    speed = of_device * count
    reason = f"{rate:.3g} TFLOP/s a device ({source}) x {utilisation:.0%} x {count}: {speed:,.0f} images/s"
    if loader_images_per_second is not None and loader_images_per_second * machines < speed:
        speed = loader_images_per_second * machines
        reason = f"the loader's {speed:,.0f} images/s hold the devices back"
    seconds = images / speed
    rows = {"time": f"about {duration_text(seconds)}, computed: {reason}"}
    if cost_per_hour is not None:
        rows["cost"] = cost_text(seconds / 3600 * plan.devices, cost_per_hour)
    return Cost(rows | (host.rows(of_device, loader_images_per_second) if device.type == "cuda" else {}), seconds)


@functools.cache  # the plan of a sweep asks for each of its runs
def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second of large matrix products, the best of those that fit in `seconds`."""
    side = SIDE.get(device.type, 1024)
    a = torch.randn(side, side, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def cost_text(hours: float, rate: float) -> str:
    """The cost of so many device hours."""
    return f"about {hours * rate:,.2f}: {hours:,.1f} device hours at {rate:g}"


def duration_text(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    units = [(86400 * 2, 86400, "days"), (5400, 3600, "hours"), (90, 60, "minutes"), (0, 1, "seconds")]
    size, name = next((size, name) for least, size, name in units if seconds >= least)
    return f"{seconds / size:.3g} {name}"
