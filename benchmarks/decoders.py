"""Decoders against each other: seconds of a ViT-B/16 pre-training step, and the memory that it holds for backward.

python benchmarks/decoders.py --json decoders.json

`self` is the paper's decoder (8 blocks). The others are CrossMAE's (12 blocks) with three quarters or one quarter of
the patches predicted, mask tokens in the encoder, and one layer on them. A row's `ours` is that decoder, its `peer` is
`self`.
"""

from typing import Any

import torch
from peers import DECODER, MASK_RATIO, VIT_BASE, training_step
from protocol import Case, Row, arguments, as_run, best_format, compare, interleave, print_times, report

from mae.models.mae import MaskedAutoencoder
from mae.perf.activations import saved_for_backward
from mae.tools.cost import forward_flops

CROSS: dict[str, Any] = dict(decoder="cross", decoder_depth=12)
KINDS: dict[str, tuple[dict[str, Any], float | None]] = {  # changes of the model, share of patches that is predicted
    "self": ({}, None),
    "self, 12 blocks": ({"decoder_depth": 12}, None),
    "cross, predict_ratio 0.75": (CROSS, 0.75),
    "cross, predict_ratio 0.25": (CROSS, 0.25),
    "self, mask tokens in the encoder": ({"mask_tokens": "encoder"}, None),
    "linear, mask tokens in the encoder": ({"decoder": "linear", "mask_tokens": "encoder"}, None),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="these beside self")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, name = best_format(args.device)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    kinds = {kind: KINDS[kind] for kind in dict.fromkeys(["self", *args.only])}
    cases, saved, flops = [], {}, {}
    for kind, (changes, share) in kinds.items():
        model = MaskedAutoencoder(**VIT_BASE, **{**DECODER, **changes})
        flops[kind] = 3 * forward_flops(model.to("meta"), MASK_RATIO, share).total
        model = MaskedAutoencoder(**VIT_BASE, **{**DECODER, **changes}).to(args.device)
        saved[kind] = saved_per_image(model, images, share, dtype)
        as_run(model, args.device)
        step = training_step(model, loss_of(model, images, share), device=args.device, dtype=dtype, fused=True)
        cases.append(Case(kind, step, args.device == "cpu"))
    timing = dict(rounds=args.rounds, warmups=args.warmups, device=args.device, clock=args.clock)
    seconds = interleave(cases, **timing)
    print(f"{args.device}, {name}, batch {args.batch}, {args.threads} threads, {args.rounds} rounds")
    print_times(seconds)
    for kind in kinds:
        print(f"  {kind:<42} {flops[kind] / 1e9:8.1f} GFLOPs an image in training")
    rows = []
    for kind in kinds:
        if kind != "self":
            rows.append(compare(0, f"{kind}: step, s", seconds[kind], seconds["self"], 1.0))
            mine, base = saved[kind] / 1e6, saved["self"] / 1e6
            rows.append(Row(0, f"{kind}: saved for backward, MB an image", mine, base, base / mine, 1.0))
    report(rows, args.json)


def loss_of(model: MaskedAutoencoder, images: torch.Tensor, share: float | None):
    """The step's loss, as a function without arguments."""
    return lambda: model(images, MASK_RATIO, predict_ratio=share).loss


def saved_per_image(model: MaskedAutoencoder, images: torch.Tensor, share: float | None, dtype: torch.dtype) -> float:
    """Bytes that autograd holds between forward and backward for one more image."""
    sizes = []
    for count in (1, 2):
        with (
            saved_for_backward(model.parameters()) as saved,
            torch.autocast(images.device.type, dtype, enabled=dtype.itemsize == 2),
        ):
            loss = model(images[:count], MASK_RATIO, predict_ratio=share).loss
        sizes.append(sum(saved.values()))
        del loss
    return sizes[1] - sizes[0]


if __name__ == "__main__":
    main()
