"""Rows 1 to 4: the pretraining step of ViT-B/16 against the reference's and transformers'.

python benchmarks/step.py --json step.json
"""

import gc
from collections.abc import Callable

import torch
from floor import products
from peers import DECODER, MASK_RATIO, VIT_BASE, ReferenceMAE, training_step, transformers_mae
from protocol import (
    Case,
    Row,
    as_run,
    best_format,
    compare,
    interleave,
    of_a_step,
    print_mfu,
    print_times,
    report,
    timing,
)
from torch.utils.flop_counter import FlopCounterMode

from mae.models.mae import MaskedAutoencoder
from mae.tools.cost import forward_flops

SINGLE = torch.float32


def main() -> None:
    parser = of_a_step(__doc__)
    parser.add_argument("--skip-transformers", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    (best, best_name), device = best_format(args.device), args.device
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    ours = MaskedAutoencoder(**VIT_BASE, **DECODER).to(device)
    keeps = device == "cpu" and not args.same_allocator

    def case(dtype: torch.dtype) -> Case:
        step = training_step(ours, lambda: ours(images, MASK_RATIO).loss, device=device, dtype=dtype, fused=True)
        return Case(f"ours {dtype}", step, keeps)

    half = case(best)
    single = half if best == SINGLE else case(SINGLE)
    print(f"{device}, batch {args.batch}, {args.threads} threads, {args.rounds} rounds; peers under glibc's defaults")
    rows = [flop_row()]

    shipped = torch.float16 if device == "cuda" else SINGLE  # the reference's own autocast works on GPUs alone
    theirs = {dtype: reference_step(images, device, dtype) for dtype in {shipped, SINGLE}}
    floors = {c.name: Case(f"{c.name}, its products alone", products(c.run), keeps) for c in (half, single)}
    as_run(ours, device, compiled=args.compile)
    mine = [half] if half is single else [half, single]
    peers = {dtype: Case(f"reference {dtype}", step) for dtype, step in theirs.items()}
    seconds = interleave([*mine, *peers.values(), *floors.values()], **timing(args))
    print_times(seconds)
    format_name = "float32" if device == "cpu" else "float32, products in TF32"
    shipped_name = str(shipped).removeprefix("torch.")
    for row, case_, peer, name, goal in (
        (1, half, shipped, f"pretrain step, {best_name}, against the reference as shipped ({shipped_name})", 2.8),
        (2, single, SINGLE, f"pretrain step, both {format_name}", 1.35),
    ):
        times = seconds[case_.name], seconds[peers[peer].name]
        rows.append(compare(row, name, *times, goal, seconds[floors[case_.name].name]))
    del theirs, peers
    gc.collect()

    if not args.skip_transformers:
        hf = transformers_mae().to(device).train()
        theirs = training_step(hf, lambda: hf(images).loss, device=device, dtype=best)
        floor = floors[half.name]
        seconds = interleave([half, Case("transformers", theirs), floor], **timing(args))
        print_times(seconds)
        name, peer = f"pretrain step against transformers' ViTMAE, both {best_name}", seconds["transformers"]
        rows.append(compare(3, name, seconds[half.name], peer, 1.45, seconds[floor.name]))
    if device == "cuda":
        with torch.device("meta"):
            counted = MaskedAutoencoder(**VIT_BASE, **DECODER)
        print_mfu(seconds[half.name], 3 * args.batch * forward_flops(counted, MASK_RATIO).total)
    report(sorted(rows, key=lambda row: row.row), args.json)


def reference_step(images: torch.Tensor, device: str, dtype: torch.dtype) -> Callable[[], None]:
    model = ReferenceMAE().to(device)
    return training_step(model, lambda: model(images, MASK_RATIO), device=device, dtype=dtype)


def flop_row() -> Row:
    """Row 4, counted on the meta device: operations a training image, ours over the reference's."""
    counts = []
    with torch.device("meta"):
        ours, peer = MaskedAutoencoder(**VIT_BASE, **DECODER), ReferenceMAE()
        images = torch.empty(1, 3, 224, 224)
        for loss in (lambda: ours(images, MASK_RATIO).loss, lambda: peer(images, MASK_RATIO)):
            with FlopCounterMode(display=False) as counter:
                loss().backward()
            counts.append(counter.get_total_flops() / 1e9)
    name = "GFLOP a training image, ours over the reference's (less is better)"
    return Row(4, name, counts[0], counts[1], counts[0] / counts[1], 0.978)


if __name__ == "__main__":
    main()
