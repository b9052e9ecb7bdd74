"""Row 10: how long the loop stands still for a checkpoint, against `torch.save` of the same state.

Ours copies the state aside and writes it in the background (verified, atomic); the wait for that write lies outside
of the timed part, as steps do in a run. The first checkpoint also allocates the buffers and is shown by itself.

python benchmarks/checkpoint.py --json checkpoint.json
"""

import tempfile
import time
from pathlib import Path

import torch
from peers import DECODER, VIT_BASE
from protocol import Row, arguments, print_times, report

from mae.checkpoint import Checkpoints
from mae.device import keep_freed_memory
from mae.models.mae import MaskedAutoencoder


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--dir", type=Path, help="where to write; null: a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()
    model = MaskedAutoencoder(**VIT_BASE, **DECODER).to(args.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        seconds = timed(Path(folder), model, optimizer, args.rounds)
    first = seconds["ours"].pop(0), seconds["torch.save"].pop(0)
    print(f"first checkpoint: ours {first[0]:.3f} s, torch.save {first[1]:.3f} s")
    print_times(seconds)
    ours, peer = (sorted(values)[len(values) // 2] for values in seconds.values())
    name = "time the loop stands still for a checkpoint, against torch.save (less is better)"
    report([Row(10, name, ours, peer, ours / peer, 0.15)], args.json)


def timed(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round, in turn; one more than asked, the first."""
    (folder / "checkpoints").mkdir()
    saver = Checkpoints(folder, every_epochs=1, every_minutes=None, keep=1, keep_every_epochs=None)
    seconds: dict[str, list[float]] = {"ours": [], "torch.save": []}
    for step in range(1, rounds + 2):
        start = time.perf_counter()
        saver.save(step, float(step), model.state_dict(), {"optimizer": optimizer.state_dict()})
        seconds["ours"].append(time.perf_counter() - start)
        saver.wait()
        start = time.perf_counter()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "peer.pth")
        seconds["torch.save"].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
