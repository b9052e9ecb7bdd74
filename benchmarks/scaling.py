"""Images a second of one process and of several on this machine.

With `--device cuda` a process is a GPU with a batch of its own, and the last column what is left of perfect scaling. On
a CPU all share the same cores and the batch, so that it shows what the exchange of gradients costs.

python benchmarks/scaling.py --processes 1 2
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from protocol import arguments

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = arguments(__doc__, rounds=3, batch=32)
    parser.add_argument("--processes", type=int, nargs="+", help="1 2, on GPUs as many of 1 2 4 8 as there are")
    parser.add_argument("--model", help="vit_tiny, or vit_base on GPUs")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    args.processes = args.processes or ([n for n in (1, 2, 4, 8) if n <= gpus] if args.device == "cuda" else [1, 2])
    args.model = args.model or ("vit_base" if args.device == "cuda" else "vit_tiny")
    rates: dict[int, list[float]] = {n: [] for n in args.processes}
    for _ in range(args.rounds):
        for processes in args.processes:
            rates[processes].append(images_per_second(args, processes))
    base = max(rates[args.processes[0]]) / args.processes[0]
    rows = []
    print(f"{'processes':>9} {'images/s':>9} {'of perfect':>10}   {args.model}, {args.device}")
    for processes, speeds in rates.items():
        perfect = base * (processes if args.device == "cuda" else 1)
        print(f"{processes:>9} {max(speeds):9.1f} {max(speeds) / perfect:10.2f}")
        rows.append({"processes": processes, "images_per_second": max(speeds), "of_perfect": max(speeds) / perfect})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def images_per_second(args: argparse.Namespace, processes: int) -> float:
    """The fastest stretch between two log points of a run on the digits, scaled up to the model's image size."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        on_gpus = args.device == "cuda"
        size, batch = (224, args.batch * processes) if on_gpus else (112, args.batch)
        overrides = [f"model={args.model}", f"model.img_size={size}", "data=digits", f"device={args.device}"]
        overrides += [f"task.batch_size={batch}", f"task.max_steps={args.steps}", "task.log_every_steps=5"]
        overrides += ["data.num_workers=null"] if on_gpus else []
        overrides += [f"launcher.processes={processes}", f"output_dir={run}"]
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, args.threads // processes))}
        command = [sys.executable, str(ROOT / "run.py"), *overrides]
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(line["images_per_second"] for line in lines if line.get("step", 0) > 5 and "loss" in line)


if __name__ == "__main__":
    main()
