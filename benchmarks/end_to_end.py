"""Row 12: a whole pre-training run of ViT-B/16 from a folder of JPEGs against the reference's main program's loop.

Each turn is a process of its own, from its start to its end: imports, data, steps, the checkpoint. The peer is
rebuilt from the reference's description: ImageFolder and PIL with worker processes, float32 (on a GPU its float16
autocast), standard attention, AdamW as it comes, the loss read at every step, torch.save at the end. On a GPU ours
compiles its blocks first, so that a run must be long enough.

python benchmarks/end_to_end.py DIR --json end_to_end.json
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import MASK_RATIO, ReferenceMAE
from PIL.Image import Image
from protocol import arguments, compare, print_times, report
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from mae import limits

ROOT = Path(__file__).parents[1]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CHECKPOINT = "peer.pth"


def main() -> None:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("root", type=Path, help="a folder with one sub-folder a class, or with images alone")
    parser.add_argument("--steps", type=int, help="20, or 400 on a GPU")
    parser.add_argument("--workers", type=int, help="2, or one for each core where there is a GPU")
    parser.add_argument("--peer", type=Path, help="be the peer, and write here")
    args = parser.parse_args()
    args.workers = args.workers or (2 if args.device == "cpu" else limits.cpus())
    args.steps = args.steps or (20 if args.device == "cpu" else 400)
    if args.peer:
        torch.set_num_threads(args.threads)
        reference_run(args.root, args.peer, args.steps, args.batch, args.workers, args.device)
        return
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            run = Path(folder) / str(turn)
            commands = {"ours": ours(args, run), "peer": [sys.executable, __file__, *sys.argv[1:], "--peer", folder]}
            for name, command in commands.items():
                start = time.perf_counter()
                env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
                subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - start)
    print(f"{args.device}, {args.steps} steps of {args.batch} images, {args.threads} threads, {args.workers} workers")
    print_times(seconds)
    images = args.steps * args.batch
    for name, values in seconds.items():
        print(f"  {name}: {images / statistics.median(values):.2f} images/s over the whole process")
    name = "whole pre-training run from JPEGs against the reference's loop"
    report([compare(12, name, seconds["ours"], seconds["peer"], 2.5)], args.json)


def ours(args: argparse.Namespace, run: Path) -> list[str]:
    """The command line of the same run with run.py."""
    overrides = ["model=vit_base", "data=folder", f"data.root={args.root.absolute()}", "data.val_fraction=0.005"]
    overrides += [f"task.batch_size={args.batch}", f"task.max_steps={args.steps}", f"data.num_workers={args.workers}"]
    overrides += ["task.drop_last=true", "task.epochs=400", "task.log_every_steps=20", f"device={args.device}"]
    return [sys.executable, str(ROOT / "run.py"), *overrides, f"output_dir={run}"]


class Flat(torch.utils.data.Dataset):
    """Images of a folder without classes, read as ImageFolder reads them."""

    def __init__(self, root: Path, transform: Callable[[Image], Tensor]):
        self.files = sorted(p for p in root.rglob("*") if p.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(datasets.folder.default_loader(str(self.files[index]))), 0


def reference_run(root: Path, folder: Path, steps: int, batch: int, workers: int, device: str) -> None:
    """The reference's main_pretrain and engine_pretrain, from their description."""
    crop = transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    flip, norm = transforms.RandomHorizontalFlip(), transforms.Normalize(MEAN, STD)
    files = Flat(root, transforms.Compose([crop, flip, transforms.ToTensor(), norm]))
    model = ReferenceMAE().to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, betas=(0.9, 0.95))
    loader = DataLoader(files, batch, shuffle=True, num_workers=workers, drop_last=True, pin_memory=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    done = 0
    while done < steps:
        for images, _ in loader:
            for group in optimizer.param_groups:
                group["lr"] = 1e-4 * 0.5 * (1 + math.cos(math.pi * done / steps))
            with torch.autocast(device, torch.float16, enabled=device == "cuda"):
                loss = model(images.to(device, non_blocking=True), MASK_RATIO)
            if not math.isfinite(loss.item()):
                raise SystemExit("the loss is not finite")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / CHECKPOINT)


if __name__ == "__main__":
    main()
