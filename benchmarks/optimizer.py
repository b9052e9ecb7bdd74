"""Row 9: the optimizer's step on ViT-B/16's masked autoencoder against AdamW as it comes.

python benchmarks/optimizer.py --json optimizer.json
"""

import torch
from peers import DECODER, VIT_BASE
from protocol import Case, arguments, compare, interleave, print_times, report

from mae.models.mae import MaskedAutoencoder
from mae.optim import adamw, param_groups


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MaskedAutoencoder(**VIT_BASE, **DECODER).to(args.device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    groups = param_groups(model, weight_decay=0.05, layer_decay=None, no_decay=[])
    ours = adamw(groups, betas=[0.9, 0.95], eps=1e-8, fused=True)
    peer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.95))
    cases = [Case("ours", ours.step, args.device == "cpu"), Case("AdamW as it comes", peer.step)]
    seconds = interleave(
        cases, rounds=args.rounds, warmups=args.warmups, device=args.device, clock=args.clock, seconds=args.seconds
    )
    print(f"{args.device}, {sum(p.numel() for p in model.parameters()):,} weights, {args.threads} threads")
    print_times(seconds)
    name = "optimizer step against AdamW as it comes, ViT-B/16's autoencoder"
    report([compare(9, name, seconds["ours"], seconds["AdamW as it comes"], 2.5)], args.json)


if __name__ == "__main__":
    main()
