"""Table 1 of the evidence: which of the paper's findings show on CIFAR-10."""

from collections.abc import Mapping
from typing import Any

from evidence_plan import MEMBERS, TABLE_EPOCHS, TABLE_SEEDS, TABLE_TUNING_EPOCHS

from mae.report.intervals import interval
from mae.report.paper_results import PUBLISHED

Records = Mapping[str, Mapping[str, Any]]
Lines = list[str]

# member of table 1 -> (its table, its row, the default's row) among the published results
PAPER = {
    "block_0.5": ("masking", "block_0.5", "random"),
    "block": ("masking", "block", "random"),
    "grid": ("masking", "grid", "random"),
    "pixels_normalised": ("target", "pixels_normalised", "pixels_plain"),
    "pca": ("target", "pca", "pixels_plain"),
}
STAGES = {"finetune": "fine-tuned", "linear": "linear probe"}
FINDINGS = ("shows", "reversed", "better", "worse", "open")
COMPARISON = """\
Each member is pre-trained for {epochs} epochs and fine-tuned for {tuning} on 5,000 labels, where the paper's ViT-L has
800 and 50 on ImageNet. A member is above or below the default where its interval of 95 % is, in every seed. The
intervals are those of the number of test images (Wilson). The finding of the paper then shows or is reversed; else it
is open. Members without a number of the paper are called better, worse or open."""


def each(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def table1(results: Records) -> Lines:
    """Members beside the paper's, and whether the paper's difference to the default shows in every seed."""
    tops = {
        (member, stage): [interval(result["top1"], result["val_images"]) for result in seeds_of(results, member, stage)]
        for member in MEMBERS
        for stage in STAGES
    }
    if any(len(top) < TABLE_SEEDS for top in tops.values()):
        return []
    lines = [*COMPARISON.format(epochs=TABLE_EPOCHS, tuning=TABLE_TUNING_EPOCHS).splitlines(), ""]
    lines += ["| member | " + " | ".join(f"{title} | the paper's | finding" for title in STAGES.values()) + " |"]
    lines += ["|---" * 7 + "|"]
    findings: dict[tuple[str, str], list[str]] = {}  # stage, finding -> members
    for member in MEMBERS:
        cells = [member]
        for stage in STAGES:
            ours = each([result["top1"] for result in seeds_of(results, member, stage)])
            paper, finding = compared(member, stage, tops)
            cells += [ours, paper, finding]
            findings.setdefault((stage, finding), []).append(f"`{member}`")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for stage, title in STAGES.items():
        kinds = [f"{kind} {', '.join(findings[stage, kind])}" for kind in FINDINGS if (stage, kind) in findings]
        lines.append(f"- {title}: {'; '.join(kinds)}")
    return lines


def seeds_of(results: Records, member: str, stage: str) -> list[Mapping[str, Any]]:
    """The results of a stage of table 1, in the order of the seeds."""
    names = [f"table1/{member}_seed_{seed}/{stage}" for seed in range(TABLE_SEEDS)]
    return [results[name]["result"] for name in names if name in results]


def compared(member: str, stage: str, limits: Mapping[tuple[str, str], list[tuple[float, float]]]) -> tuple[str, str]:
    """The paper's numbers, and what the limits of each seed's interval say of its difference to the default."""
    if member == "default":
        return "–", "–"
    pairs = list(zip(limits[member, stage], limits["default", stage], strict=True))
    above = all(low > high for (low, _), (_, high) in pairs)
    below = all(high < low for (_, high), (low, _) in pairs)
    if member not in PAPER:
        return "–", "better" if above else "worse" if below else "open"
    table, row, base = PAPER[member]
    points = PUBLISHED[table]["finetune" if stage == "finetune" else "linprobe"].points
    finding = "open" if not (above or below) else "shows" if above is (points[row] > points[base]) else "reversed"
    return f"{points[row]:.1f} (default {points[base]:.1f})", finding
