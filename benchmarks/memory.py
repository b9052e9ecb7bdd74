"""Row 5: activations kept for backward by a ViT-B/16 pretraining step, an image; and the peak of a whole step.

python benchmarks/memory.py --json memory.json --peak-batch 64
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peers import DECODER, MASK_RATIO, VIT_BASE, ReferenceMAE, training_step, transformers_mae
from protocol import Row, arguments, report
from torch import Tensor, nn

from mae.models.layers import set_checkpointing
from mae.models.mae import MaskedAutoencoder

Loss = Callable[[Tensor], Tensor]


def ours() -> tuple[nn.Module, Loss]:
    model = MaskedAutoencoder(**VIT_BASE, **DECODER)
    return model, lambda images: model(images, MASK_RATIO).loss


def ours_checkpointed() -> tuple[nn.Module, Loss]:
    model, loss = ours()
    set_checkpointing(model, "blocks")
    return model, loss


def reference() -> tuple[nn.Module, Loss]:
    model = ReferenceMAE()
    return model, lambda images: model(images, MASK_RATIO)


def transformers() -> tuple[nn.Module, Loss]:
    model = transformers_mae().train()
    return model, lambda images: model(images).loss


MODELS = {"ours": ours, "ours, checkpointed": ours_checkpointed, "reference": reference, "transformers": transformers}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peak-batch", type=int, default=16, help="images of the step whose peak is measured")
    parser.add_argument("--only", nargs=2, metavar=("MODEL", "DTYPE"), help="take one step and print its peak")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(peak_of_a_step(*args.only, batch=args.peak_batch))
        return
    kept = {(model, dtype): saved_per_image(model, dtype) for model in MODELS for dtype in DTYPES}
    print(f"{'':<32} {'kept, MB an image':>18} {f'peak, GB at {args.peak_batch}':>18}")
    for (model, dtype), saved in kept.items():
        command = [sys.executable, __file__, "--only", model, dtype, "--peak-batch", str(args.peak_batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{model + ', ' + dtype:<32} {saved / 1e6:18.1f} {int(done.stdout.split()[-1]) / 1e9:18.2f}")
    theirs = kept["reference", "float32"]
    name = "MB of saved activations an image, both {} (less is better)"
    rows = [row(name.format("float32"), kept["ours", "float32"], theirs)]
    rows += [row(name.format("bfloat16"), kept["ours", "bfloat16"], kept["reference", "bfloat16"])]
    rows += [row("the same, ours in bfloat16, the reference in float32", kept["ours", "bfloat16"], theirs)]
    report(rows, args.json)


def row(name: str, mine: float, theirs: float) -> Row:
    return Row(5, name, mine / 1e6, theirs / 1e6, mine / theirs, 0.60)


def saved_per_image(model: str, dtype: str, small: int = 1, large: int = 3) -> float:
    """Bytes autograd holds between forward and backward for one more image: weights and casts of them drop out."""
    net, loss = MODELS[model]()
    held = {}
    for batch in (small, large):
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        images = torch.randn(batch, 3, 224, 224)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", dtype=DTYPES[dtype], enabled=dtype != "float32"),
        ):
            value = loss(images)
        held[batch] = sum(storages.values())
        del value
    del net
    return (held[large] - held[small]) / (large - small)


def peak_of_a_step(model: str, dtype: str, batch: int) -> int:
    """The most bytes this process held over two whole steps, weights and optimiser included (Linux)."""
    net, loss = MODELS[model]()
    images = torch.randn(batch, 3, 224, 224)
    step = training_step(net, lambda: loss(images), device="cpu", dtype=DTYPES[dtype], fused="ours" in model)
    step()
    step()
    # not getrusage's maximum, which a child process inherits from its parent
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
