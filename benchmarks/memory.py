"""Row 5: activations saved for the backward pass of a ViT-B/16 pretraining step, an image.

Also the peak memory and time of a whole step, and what `task.checkpointing` saves and costs.

python benchmarks/memory.py --json memory.json --peak-batch 64
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peers import DECODER, MASK_RATIO, VIT_BASE, ReferenceMAE, training_step, transformers_mae
from protocol import A_GPU, Row, arguments, as_run, best_format, report, timed
from torch import Tensor, nn

from mae.device import keep_freed_memory
from mae.models.layers import Checkpointing, set_checkpointing
from mae.models.mae import MaskedAutoencoder

Loss = Callable[[Tensor], Tensor]


def ours(checkpointing: Checkpointing = "light") -> tuple[nn.Module, Loss]:
    model = MaskedAutoencoder(**VIT_BASE, **DECODER)
    set_checkpointing(model, checkpointing)
    return model, lambda images: model(images, MASK_RATIO).loss


def reference() -> tuple[nn.Module, Loss]:
    model = ReferenceMAE()
    return model, lambda images: model(images, MASK_RATIO)


def transformers() -> tuple[nn.Module, Loss]:
    model = transformers_mae().train()
    return model, lambda images: model(images).loss


MODELS = {
    "ours": ours,  # task.checkpointing=light, as it comes
    "ours, none": partial(ours, "none"),
    "ours, blocks": partial(ours, "blocks"),
    "reference": reference,
    "transformers": transformers,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peak-batch", type=int, help="images of the step whose peak is measured; 16, or 256 on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=None, help="what the device computes in")
    parser.add_argument("--only", nargs=2, metavar=("MODEL", "DTYPE"), help="take steps and print their peak")
    args = parser.parse_args()
    args.peak_batch = args.peak_batch or (A_GPU if args.device == "cuda" else 16)
    args.dtypes = args.dtypes or sorted({"float32", best_format(args.device)[1]}, reverse=True)
    torch.set_num_threads(args.threads)
    if args.only:
        print(*peak_of_a_step(*args.only, batch=args.peak_batch, device=args.device))
        return
    saved = {(model, dtype): saved_per_image(model, dtype, args.device) for model in MODELS for dtype in args.dtypes}
    print("saved: activations of the models as they are, not compiled")
    print(f"{'':<32} {'saved, MB an image':>18} {f'peak, GB at {args.peak_batch}':>18} {'s a step':>9}")
    for (model, dtype), size in saved.items():
        command = [sys.executable, __file__, "--only", model, dtype, "--peak-batch", str(args.peak_batch)]
        command += ["--device", args.device]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, seconds = done.stdout.split()[-2:]
        figures = f"{size / 1e6:18.1f} {int(peak) / 1e9:18.2f} {float(seconds):9.2f}"
        print(f"{model + ', ' + dtype:<32} {figures}", flush=True)
    name = "MB of saved activations an image, both {} (less is better)"
    rows = [row(name.format(dtype), saved["ours", dtype], saved["reference", dtype]) for dtype in args.dtypes]
    if len(args.dtypes) == len(DTYPES):
        name = "the same, ours in bfloat16, the reference in float32"
        rows.append(row(name, saved["ours", "bfloat16"], saved["reference", "float32"]))
    report(rows, args.json)


def row(name: str, mine: float, theirs: float) -> Row:
    return Row(5, name, mine / 1e6, theirs / 1e6, mine / theirs, 0.65)


def saved_per_image(model: str, dtype: str, device: str, small: int = 1, large: int = 3) -> float:
    """Bytes autograd holds between forward and backward for one more image: weights and casts of them drop out."""
    net, loss = MODELS[model]()
    net.to(device)
    held = {}
    for batch in (small, large):
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        images = torch.randn(batch, 3, 224, 224, device=device)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast(device, dtype=DTYPES[dtype], enabled=dtype != "float32"),
        ):
            value = loss(images)
        held[batch] = sum(storages.values())
        del value
    del net
    return (held[large] - held[small]) / (large - small)


def peak_of_a_step(model: str, dtype: str, batch: int, device: str) -> tuple[int, float]:
    """The most bytes this process held over two whole steps, weights and optimiser included (Linux; on a GPU those of
    torch's allocator), and the seconds of the second."""
    if "ours" in model:  # as our runs have it
        keep_freed_memory()
    net, loss = MODELS[model]()
    net.to(device)
    if "ours" in model:
        as_run(net, device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    step = training_step(net, lambda: loss(images), device=device, dtype=DTYPES[dtype], fused="ours" in model)
    step()
    seconds = timed(step, device, time.perf_counter)
    if device == "cuda":
        return torch.cuda.max_memory_allocated(), seconds
    # not getrusage's maximum, which a child process inherits from its parent
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024, seconds


if __name__ == "__main__":
    main()
