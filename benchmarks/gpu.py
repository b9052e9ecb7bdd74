"""The speed of a GPU's training step, in one table: checks 11, 24 and 25 of docs/gpu.md.

python benchmarks/gpu.py --json gpu.json

It ends with a code that is not 0 where a goal is missed. With two GPUs and more the rows of several are measured too.
`--device cpu` runs all of it on the CPU with tiny sizes, to prove the script; its goals are not judged.
"""

import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checkpoint import timed as stalls
from loader import MAX_PIXELS
from loader import ours as loaded
from peers import DECODER, MASK_RATIO, VIT_BASE, training_step
from photos import write_photos
from protocol import (
    A_GPU,
    Case,
    Row,
    arguments,
    as_run,
    best_format,
    interleave,
    peak_rate,
    print_times,
    reached,
    report,
)
from torch import nn

from mae import limits
from mae.data.decode import Decoder
from mae.data.sources.folder import Files
from mae.data.sources.listing import scan
from mae.device import description
from mae.distributed.ranks import start
from mae.models.mae import MaskedAutoencoder
from mae.tools.cost import forward_flops, matrix_rate

AHEAD = 8  # steps that the host may be ahead of a GPU
FEW = 8  # images of a step whose time on a GPU is that of launching its kernels


@dataclass(frozen=True)
class Sizes:
    """What is measured: ViT-B/16 on a GPU, or what takes moments anywhere."""

    model: dict[str, Any]
    batch: int
    rounds: int
    photos: int
    seconds: float  # of the loader beside the step

    @property
    def image(self) -> int:
        return self.model["img_size"]


GPU = Sizes(VIT_BASE | DECODER, A_GPU, 10, 512, 10.0)
SMALL = dict(img_size=64, embed_dim=64, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1)
TINY = Sizes(VIT_BASE | DECODER | SMALL | {"decoder_num_heads": 2}, 8, 3, 32, 2.0)


def main() -> None:
    parser = arguments(__doc__, rounds=GPU.rounds)
    parser.add_argument("--tiny", action="store_true", help="the CPU's sizes on a GPU too, to prove the script there")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    sizes = GPU if on_gpu and not args.tiny else TINY
    torch.set_num_threads(args.threads)
    if on_gpu and not torch.cuda.is_available():
        sys.exit("There is no GPU here. With --device cpu the script runs on the CPU, at tiny sizes.")
    name, version = description(torch.device(args.device, 0) if on_gpu else torch.device("cpu"))
    print(f"{name}, CUDA {version}, torch {torch.__version__}, {limits.cpus()} cores, {sizes.batch} images a step")
    began = time.perf_counter()
    rows = [*step_rows(sizes, args.device), *loader_rows(sizes, args.device), stall_row(sizes, args.device)]
    ranks = torch.cuda.device_count() if on_gpu else 2
    rows += scaling_rows(sizes, args.device, ranks) if ranks > 1 else []
    print(f"\n{time.perf_counter() - began:.0f} s")
    report(rows, args.json)
    missed = [row.name for row in rows if not reached(row)]
    if sizes is TINY:
        print("The goals are those of a GPU that is full, and are not judged here.")
    elif missed:
        sys.exit(f"missed: {'; '.join(missed)}")


def step_of(model: nn.Module, batch: int, sizes: Sizes, device: str) -> Callable[[], None]:
    images = torch.randn(batch, 3, sizes.image, sizes.image, device=device)
    dtype, _ = best_format(device)
    return training_step(model, lambda: model(images, MASK_RATIO).loss, device=device, dtype=dtype, fused=True)


def autoencoder(sizes: Sizes, device: str, compiled: bool) -> MaskedAutoencoder:
    model = MaskedAutoencoder(**sizes.model).to(device)
    if compiled:
        as_run(model, device)
    return model


def step_rows(sizes: Sizes, device: str) -> list[Row]:
    """Images a second and MFU of the step as runs compile it, and what launching its kernels takes."""
    model = autoencoder(sizes, device, compiled=True)
    cases = [
        Case("ours", step_of(model, sizes.batch, sizes, device)),
        Case("ours, not compiled", step_of(autoencoder(sizes, device, compiled=False), sizes.batch, sizes, device)),
        Case(f"ours, {FEW} images", step_of(autoencoder(sizes, device, compiled=True), FEW, sizes, device)),
    ]
    seconds = interleave(cases, rounds=sizes.rounds, warmups=2, device=device)
    print_times(seconds)
    ours, plain, launch = (statistics.median(values) for values in seconds.values())
    with torch.device("meta"):
        operations = 3 * sizes.batch * forward_flops(MaskedAutoencoder(**sizes.model), MASK_RATIO).total
    if device == "cuda":
        peak, source = peak_rate()
    else:
        peak, source = matrix_rate(torch.device("cpu"), best_format("cpu")[0], 0.2), "measured"
    print(f"peak {peak / 1e12:.3g} TFLOP/s ({source})")
    print(f"below {sizes.batch * launch / ours:.0f} images a step its launches take longer than its kernels")
    images = sizes.batch / ours, sizes.batch / plain
    rate = operations / ours
    return [
        Row(101, "images/s of the step, compiled, against the same step uncompiled", *images, plain / ours, 1.0),
        Row(102, "FLOP/s of the step over the peak (MFU)", rate, peak, rate / peak, 0.35),
        Row(103, "launching a step over the step (less is better)", launch, ours, launch / ours, 0.8),
    ]


def loader_rows(sizes: Sizes, device: str) -> list[Row]:
    """The loader and the step beside each other, in two threads of a process as in a run."""
    step, workers = step_of(autoencoder(sizes, device, compiled=True), sizes.batch, sizes, device), limits.cpus()
    step()
    alone = counted(step, sizes.seconds, device)
    beside: list[float] = []

    def train() -> None:
        beside.append(counted(step, sizes.seconds, device))

    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), sizes.photos)
        files = Files(scan(Path(folder), None, follow_links=True)[0], Decoder(3, False, MAX_PIXELS))
        batches = loaded(files, 1 << 20, sizes.batch, workers)
        for _ in range(workers):
            next(batches)
        thread, images, began = threading.Thread(target=train), 0, time.perf_counter()
        thread.start()
        while thread.is_alive():
            images += next(batches)
        rate, eaten = images / (time.perf_counter() - began), alone * sizes.batch
        batches.close()  # type: ignore[attr-defined]  # a generator, whose loader ends with it
    print(f"loader beside the step: {workers} workers, {rate:.0f} images/s; the step alone takes {eaten:.0f}")
    return [
        Row(104, "images/s of the loader beside the step, against what the step takes", rate, eaten, rate / eaten, 1.0),
        Row(105, "steps/s beside the loader, against alone", beside[0], alone, beside[0] / alone, 0.9),
    ]


def counted(step: Callable[[], None], seconds: float, device: str) -> float:
    """Steps a second over so many seconds, all of which have ended."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        step()
        count += 1
        if device == "cuda" and not count % AHEAD:
            torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def stall_row(sizes: Sizes, device: str) -> Row:
    """How long the loop stands still for a checkpoint; row 10 of the scoreboard."""
    model = autoencoder(sizes, device, compiled=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    step_of(model, FEW, sizes, device)()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        seconds = stalls(Path(folder), model, optimizer, 3)
    ours, peer = (statistics.median(values[1:]) for values in seconds.values())
    name = "time the loop stands still for a checkpoint, against torch.save (less is better)"
    return Row(10, name, ours, peer, ours / peer, 0.15)


# ---------------------------------------------------------------- several GPUs


def scaling_rows(sizes: Sizes, device: str, ranks: int) -> list[Row]:
    """What is left of perfect scaling, and how much of the exchange is hidden behind the backward pass."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        file = Path(folder) / "seconds.json"
        mp.spawn(rank_main, (ranks, port, device, sizes, file), nprocs=ranks)  # type: ignore[attr-defined]
        alone, together, exchange = json.loads(file.read_text())
    print(f"{ranks} ranks: step {alone:.4f} s alone, {together:.4f} s with its exchange, which takes {exchange:.4f} s")
    shown = max(0.0, together - alone)
    name = f"rate of a step with {ranks} ranks over that of one"
    return [
        Row(106, name, 1 / together, 1 / alone, alone / together, 0.93),
        Row(107, "part of the exchange that is hidden", exchange - shown, exchange, 1 - shown / exchange, 0.8),
    ]


def rank_main(rank: int, world: int, port: int, device: str, sizes: Sizes, file: Path) -> None:
    """Writes the median seconds of a rank's step alone, of a step that exchanges gradients, and of the exchange."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    ranks = start(device, timeout_s=200, rendezvous_timeout_s=100, sharding="none")
    model = autoencoder(sizes, device, compiled=True)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    alone = measured(step_of(model, sizes.batch, sizes, device), sizes, device)
    together = measured(step_of(ranks.wrap(model, accumulating=False), sizes.batch, sizes, device), sizes, device)
    gradients = torch.zeros(numbers, device=ranks.device)
    exchange = measured(lambda: dist.all_reduce(gradients), sizes, device)
    if rank == 0:
        file.write_text(json.dumps([alone, together, exchange]))
    ranks.close()


def measured(run: Callable[[], object], sizes: Sizes, device: str) -> float:
    """The median seconds of a call that all ranks make equally often."""
    dist.barrier()
    seconds = interleave([Case("run", run)], rounds=sizes.rounds, warmups=2, device=device)
    return statistics.median(seconds["run"])


if __name__ == "__main__":
    main()
