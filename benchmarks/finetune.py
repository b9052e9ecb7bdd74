"""Row 11: the fine-tuning step of ViT-B/16 against timm's model as it comes, both in the device's best format.

python benchmarks/finetune.py --json finetune.json
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from floor import products
from peers import VIT_BASE, soft_targets, timm_classifier, training_step
from protocol import Case, as_run, best_format, compare, interleave, of_a_step, print_mfu, print_times, report
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mae.models.vit import classifier


def main() -> None:
    args = of_a_step(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, (dtype, dtype_name) = args.device, best_format(args.device)
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    targets = soft_targets(args.batch, 1000, device)

    def step(model: nn.Module, fused: bool) -> Callable[[], None]:
        model.to(device).train()
        return training_step(
            model,
            lambda: F.cross_entropy(model(images).float(), targets),
            device=device,
            dtype=dtype,
            fused=fused,
        )

    ours = classifier(**VIT_BASE, num_classes=1000, drop_path=0.1, global_pool="avg")
    cases = [
        Case("ours", step(ours, fused=True), device == "cpu" and not args.same_allocator),
        Case("timm", step(timm_classifier(), fused=False)),
    ]
    cases.append(Case("ours, its products alone", products(cases[0].run), cases[0].keeps_memory))
    as_run(ours, device, compiled=args.compile)
    seconds = interleave(
        cases, rounds=args.rounds, warmups=args.warmups, device=device, clock=args.clock, seconds=args.seconds
    )
    print(f"{device}, batch {args.batch}, {args.threads} threads, {args.rounds} rounds; peers under glibc's defaults")
    print_times(seconds)
    if device == "cuda":
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            classifier(**VIT_BASE, num_classes=1000, drop_path=0.0, global_pool="avg")(torch.empty(1, 3, 224, 224))
        print_mfu(seconds["ours"], 3 * args.batch * counter.get_total_flops())
    name = f"fine-tune step against timm's model as it comes, both {dtype_name}"
    report([compare(11, name, seconds["ours"], seconds["timm"], 1.3, seconds[cases[-1].name])], args.json)


if __name__ == "__main__":
    main()
