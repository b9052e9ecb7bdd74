"""The loss of pre-training with the residual stream in bf16 beside that in float32, step by step.

Both runs have the same config but for that key: seed, images, crops and masks are the same. The standard error of the
mean says how much of the last losses is the chance of which images and masks the steps had.

python benchmarks/residual.py PHOTOS --json residual.json
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mae.runs.files import read_json_lines  # noqa: E402

LAST = 50  # steps over which losses are averaged
RUNS = {"float32": [], "bf16": ["task.residual_dtype=bf16"]}
SMALL_DECODER = ["model.decoder_embed_dim=192", "model.decoder_depth=2", "model.decoder_num_heads=6"]
LEARNING_RATE = 3e-4  # of AdamW, whatever the batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of JPEGs")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/residual"), help="runs lie here; finished ones are read"
    )
    parser.add_argument("--model", default="vit_small")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    losses = {name: curve(args, name) for name in RUNS}
    figures = [compared(name, losses[name], losses["float32"]) for name in RUNS]
    sizes = f"{args.model}, {args.img_size} x {args.img_size} pixels, {args.batch} images a step, {args.device}"
    print(f"{sizes}\n{table(figures)}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def curve(args: argparse.Namespace, name: str) -> Tensor:
    """The loss (steps,) of a run, which is trained first where it has not been."""
    run = args.runs / name
    overrides = [
        f"model={args.model}",
        *SMALL_DECODER,
        "data=folder",
        f"data.root={args.photos.absolute()}",
        f"data.img_size={args.img_size}",
        "data.num_workers=0",
        "task.precision=bf16",
        "task.compile=off",
        f"task.batch_size={args.batch}",
        "task.drop_last=true",
        f"task.max_steps={args.steps}",
        "task.epochs=40",
        "task.warmup_epochs=2",
        "task.eval_every_epochs=1000",
        "task.log_every_steps=1",
        f"optimizer.base_lr={LEARNING_RATE * 256 / args.batch}",
        f"device={args.device}",
        f"output_dir={run}",
    ]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(ROOT / "run.py"), *overrides, *RUNS[name]], check=True, env=env)
    lines = read_json_lines(run / "metrics.jsonl")
    return torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64)


def compared(name: str, losses: Tensor, reference: Tensor) -> dict[str, float | str]:
    """A run's mean loss of the last steps, and how far its curve lies from the reference's, relative to that."""
    difference = (losses - reference) / reference
    return {
        "run": name,
        "first": float(losses[0]),
        "last": float(losses[-LAST:].mean()),
        "standard_error": float(losses[-LAST:].std() / LAST**0.5),
        "last_difference": float(losses[-LAST:].mean() / reference[-LAST:].mean() - 1),
        "mean_difference": float(difference.abs().mean()),
        "largest_difference": float(difference.abs().max()),
    }


def table(figures: Iterable[dict[str, float | str]]) -> str:
    """The figures as a table of Markdown."""
    head = f"| `task.residual_dtype` | first loss | mean of the last {LAST} | its standard error | difference of it "
    head += "| mean difference of a step | largest |"
    rows = [
        f"| {f['run']} | {f['first']:.4f} | {f['last']:.4f} | {f['standard_error']:.4f} | {f['last_difference']:+.3%} "
        f"| {f['mean_difference']:.3%} | {f['largest_difference']:.3%} |"
        for f in figures
    ]
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    main()
