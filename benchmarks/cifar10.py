"""What pre-training is worth: fine-tuning on few labels of CIFAR-10 from a masked autoencoder, and from scratch.

    python benchmarks/cifar10.py DIR [--seeds 3] [--out runs/cifar10] [--jobs 2] [--json FILE]

DIR holds train/CLASS/*.jpg and test/CLASS/*.jpg. One pre-training without labels, then for each seed the same
fine-tuning (experiment=cifar10_finetune) from it and, at a lower rate, from scratch, `jobs` of them at a time, each
with its share of the cores. What is finished is not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(folder: Path, threads: int, *overrides: str) -> dict:
    """Runs run.py on that many cores; returns the summary."""
    command = [sys.executable, str(ROOT / "run.py"), *overrides, f"output_dir={folder}"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=env)
    return json.loads((folder / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="more overrides for the fine-tuning runs")
    args = parser.parse_args()
    folder, data, cores = args.out.absolute(), f"data.root={args.root.absolute()}", os.cpu_count() or 1
    started = time.monotonic()
    pretrained = run(folder / "pretrain", cores, "experiment=cifar10_pretrain", data)
    scratch = ["optimizer.layer_decay=null", "optimizer.base_lr=2.4e-3"]  # with 8e-3 it reached 38 % (one seed)
    starts = {"masked autoencoder": [f"init={folder / 'pretrain'}"], "from scratch": scratch}
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {name: [] for name in starts}
        for seed in range(args.seeds):
            tuning = ["experiment=cifar10_finetune", data, f"seed={seed}", *args.overrides]
            for name, start in starts.items():
                member = folder / f"{name.replace(' ', '_')}_{seed}"
                runs[name].append(pool.submit(run, member, max(1, cores // args.jobs), *tuning, *start))
        rows = {name: [future.result() for future in futures] for name, futures in runs.items()}
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all, {args.jobs} fine-tunings at a time")
    print(f"pre-training: {pretrained['epochs']:g} epochs, {pretrained['seconds'] / 60:.1f} minutes")
    print(f"{'start':<20} {'top-1 of each seed':<24} {'mean':>6} {'dev.':>5} {'minutes a run':>14}")
    for name, summaries in rows.items():
        top1 = [summary["top1"] for summary in summaries]
        deviation = statistics.stdev(top1) if len(top1) > 1 else 0.0
        minutes = statistics.mean(summary["seconds"] for summary in summaries) / 60
        each = " ".join(f"{t:.2f}" for t in top1)
        print(f"{name:<20} {each:<24} {statistics.mean(top1):6.2f} {deviation:5.2f} {minutes:14.1f}")
    if args.json:
        args.json.write_text(json.dumps({"pretrain": pretrained} | rows, indent=1))


if __name__ == "__main__":
    main()
