"""The protocol of every timing here: one process, turns taken in order, medians compared.

Absolute times of a shared machine mean little; ratios of interleaved medians do.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from mae.device import keep_freed_memory, number_format, pick, return_freed_memory
from mae.perf.compile import compile_blocks

UNTIMED = 2  # of a turn: after one alone a step of ours still faults in pages that its later ones have, measured
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Row:
    """A line of the scoreboard; `ratio` is peer / ours, so more is better, unless the name says otherwise."""

    row: int
    name: str
    ours: float
    peer: float
    ratio: float
    goal: float
    cap: float | None = None


@dataclass(frozen=True)
class Case:
    """Something to time. `keeps_memory`: it runs under `mae.device.keep_freed_memory`, as our runs do."""

    name: str
    run: Callable[[], object]
    keeps_memory: bool = False


def best_format(device: str) -> tuple[torch.dtype, str]:
    """The number format of our runs on this device, and its name: float32 where bfloat16 is merely emulated, which
    would take a benchmark hours."""
    dtype = number_format("auto", torch.device(device))
    return dtype, str(dtype).removeprefix("torch.")


def as_run(model: nn.Module, device: str, *, compiled: bool = False) -> None:
    """On a GPU: TF32 and compiled blocks, as our runs have them; `compiled`: on a CPU too, as task.compile=blocks."""
    if device == "cuda":
        pick(device)
    if device == "cuda" or compiled:
        compile_blocks(model, mode=None)


def print_mfu(seconds: list[float], operations: int) -> None:
    """Model FLOPs utilisation of a step of so many operations, against the rate that this GPU reaches on large bf16
    products."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = interleave([Case("product", lambda: a @ a)], rounds=10, warmups=5, device="cuda")["product"]
    rate = 2 * 8192**3 / min(product)
    print(f"measured matrix rate {rate / 1e12:.1f} TFLOP/s, MFU {operations / min(seconds) / rate:.3f}")


def arguments(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=defaults.get("batch", 8))
    parser.add_argument("--rounds", type=int, default=defaults.get("rounds", 7))
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: this process's own time, for a busy machine (--threads 1)"
    )
    return parser


def of_a_step(description: str | None) -> argparse.ArgumentParser:
    """Arguments of the benchmarks of a training step."""
    parser = arguments(description)
    parser.add_argument("--same-allocator", action="store_true", help="leave glibc's defaults to ours as well")
    parser.add_argument("--compile", action="store_true", help="compile our blocks on a CPU too: task.compile=blocks")
    return parser


def interleave(
    cases: list[Case], *, rounds: int, warmups: int, device: str = "cpu", clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each case in each round, A B A B.

    A turn is two untimed runs, which bring back what idled meanwhile and let the allocator settle, and one timed.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(rounds + warmups):
        for case in cases:
            if device == "cpu":
                keep_freed_memory() if case.keeps_memory else return_freed_memory()
            for _ in range(UNTIMED):
                case.run()
            duration = timed(case.run, device, CLOCKS[clock])
            if turn >= warmups:
                seconds[case.name].append(duration)
    return seconds


def timed(run: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    """Seconds from the call to the end of the work that it gave the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def print_times(seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        print(f"  {name:<42} min {min(values):8.4f} s   median {statistics.median(values):8.4f} s")


def compare(
    row: int, name: str, ours: list[float], peer: list[float], goal: float, floor: list[float] | None = None
) -> Row:
    """The row whose ratio is the peer's median over ours; its cap is the peer's over that of `floor`."""
    a, b = statistics.median(ours), statistics.median(peer)
    return Row(row, name, a, b, b / a, goal, b / statistics.median(floor) if floor else None)


def report(rows: list[Row], path: Path | None) -> None:
    """Print the scoreboard's rows and write them as JSON where `path` is given."""
    print(f"{'row':>3}  {'work':<66} {'ours':>9} {'peer':>9} {'ratio':>6} {'goal':>6} {'cap':>5}")
    for r in rows:
        cap = f"{r.cap:5.2f}" if r.cap else "    -"
        print(f"{r.row:>3}  {r.name:<66} {r.ours:9.4g} {r.peer:9.4g} {r.ratio:6.3f} {r.goal:6.3f} {cap}")
    if path:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
