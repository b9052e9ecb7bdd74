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
from typing import Any

import torch
from cards import card_called
from machine import machine
from torch import nn

from mae.device import keep_freed_memory, number_format, pick, return_freed_memory
from mae.perf.graphs import compile_blocks, compile_whole
from mae.runs.environment import revision
from mae.tools.cost import matrix_rate

A_GPU = 256  # images that fill one
A_CPU = {torch.bfloat16: 8, torch.float32: 4}  # images of a step, by what the CPU computes in: float32 alone is slow
LEAST_ROUNDS = 5
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
    commit: str | None = None
    machine: str | None = None


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
    """On a GPU: TF32 and one compiled graph, as our runs have them; `compiled`: on a CPU, as task.compile=blocks."""
    if device == "cuda":
        pick(device)
        compile_whole(model, model, (), None, cut=False)
    elif compiled:
        compile_blocks(model, mode=None)


def print_mfu(seconds: list[float], operations: int) -> None:
    """Prints the model FLOPs utilisation of a step of so many operations on this GPU."""
    peak, source = peak_rate()
    print(f"MFU {operations / min(seconds) / peak:.3f} of {peak / 1e12:.0f} TFLOP/s ({source})")


def peak_rate() -> tuple[float, str]:
    """Operations a second of this GPU in bf16 products, and where that is from: a card not listed is measured."""
    name = torch.cuda.get_device_name()
    card = card_called(name)
    if card is not None:
        return card.tflops * 1e12, card.source
    return matrix_rate(torch.device("cuda"), torch.bfloat16), f"measured, since the peak of {name} is not listed"


class Parser(argparse.ArgumentParser):
    """A parser whose `--batch` depends on `--device` where it is not given."""

    cpu_batch: int | None = None

    def parse_args(self, *args: Any, **how: Any) -> Any:
        options = super().parse_args(*args, **how)
        if options.batch is None:
            dtype, _ = best_format(options.device)
            options.batch = A_GPU if options.device == "cuda" else self.cpu_batch or A_CPU[dtype]
        return options


def arguments(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    parser = Parser(description=description)
    parser.cpu_batch = defaults.get("batch")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help="images of a step; 256 on a GPU, on a CPU fewer")
    parser.add_argument("--rounds", type=int, default=defaults.get("rounds", 7))
    parser.add_argument("--warmups", type=int, default=1, help="turns before the rounds; each has two untimed runs")
    parser.add_argument("--seconds", type=float, default=60, help="after so many no round begins, but 5 there are")
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


def timing(args: argparse.Namespace) -> dict[str, Any]:
    """Of the options, those of `interleave`."""
    return {name: getattr(args, name) for name in ("rounds", "warmups", "device", "clock", "seconds")}


def interleave(
    cases: list[Case],
    *,
    rounds: int,
    warmups: int,
    device: str = "cpu",
    clock: str = "wall",
    seconds: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of each case in each round, A B A B.

    A turn is two untimed runs, which bring back what idled meanwhile and let the allocator settle, and one timed.
    After `seconds` no further round begins, once there are five.
    """
    durations: dict[str, list[float]] = {case.name: [] for case in cases}
    end = time.perf_counter() + seconds
    for turn in range(rounds + warmups):
        if turn >= warmups + LEAST_ROUNDS and time.perf_counter() > end:
            break
        for case in cases:
            if device == "cpu":
                keep_freed_memory() if case.keeps_memory else return_freed_memory()
            for _ in range(UNTIMED):
                case.run()
            duration = timed(case.run, device, CLOCKS[clock])
            if turn >= warmups:
                durations[case.name].append(duration)
    return durations


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


def reached(row: Row) -> bool:
    """Whether a row reaches its goal."""
    return row.ratio <= row.goal if "less is better" in row.name else row.ratio >= row.goal


def report(rows: list[Row], path: Path | None) -> None:
    """Print the scoreboard's rows and write them as JSON where `path` is given."""
    print(f"{'row':>3}  {'work':<66} {'ours':>9} {'peer':>9} {'ratio':>6} {'goal':>6} {'cap':>5}")
    for r in rows:
        cap = f"{r.cap:5.2f}" if r.cap else "    -"
        print(f"{r.row:>3}  {r.name:<66} {r.ours:9.4g} {r.peer:9.4g} {r.ratio:6.3f} {r.goal:6.3f} {cap}")
    if path:
        origin = {"commit": revision(), "machine": machine()}
        path.write_text(json.dumps([asdict(row) | origin for row in rows], indent=1))
