"""What pre-training is worth: fine-tuning on few labels of CIFAR-10 from a masked autoencoder, and from scratch.

    python benchmarks/cifar10.py DIR [--seeds 3] [--out runs/cifar10] [--json FILE]

DIR holds train/CLASS/*.jpg and test/CLASS/*.jpg. One pre-training without labels, then for each seed the same
fine-tuning (experiment=cifar10_finetune) from it and from scratch. What is finished is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(out: Path, *overrides: str) -> dict:
    """A run of run.py; returns its summary."""
    command = [sys.executable, str(ROOT / "run.py"), *overrides, f"output_dir={out}"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads((out / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="more overrides for the fine-tuning runs")
    given = parser.parse_args()
    out, data = given.out.absolute(), f"data.root={given.root.absolute()}"
    pretrained = run(out / "pretrain", "experiment=cifar10_pretrain", data)
    rows = {"from scratch": [], "masked autoencoder": []}
    for seed in range(given.seeds):
        tuning = ["experiment=cifar10_finetune", data, f"seed={seed}", *given.overrides]
        rows["from scratch"].append(run(out / f"scratch_{seed}", *tuning, "optimizer.layer_decay=null"))
        rows["masked autoencoder"].append(run(out / f"finetune_{seed}", *tuning, f"init={out / 'pretrain'}"))
    print(f"pre-training: {pretrained['epochs']:g} epochs, {pretrained['seconds'] / 60:.1f} minutes")
    print(f"{'start':<20} {'top-1 of each seed':<24} {'mean':>6} {'dev.':>5} {'minutes a run':>14}")
    for name, runs in rows.items():
        top1 = [r["top1"] for r in runs]
        deviation = statistics.stdev(top1) if len(top1) > 1 else 0.0
        minutes = statistics.mean(r["seconds"] for r in runs) / 60
        each = " ".join(f"{t:.2f}" for t in top1)
        print(f"{name:<20} {each:<24} {statistics.mean(top1):6.2f} {deviation:5.2f} {minutes:14.1f}")
    if given.json:
        given.json.write_text(json.dumps({"pretrain": pretrained} | rows, indent=1))


if __name__ == "__main__":
    main()
