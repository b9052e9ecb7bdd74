"""Table 1 of the paper (arXiv 2111.06377), laid out of the members of `+sweeps=table1`, with the published results."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from mae.report.flops import member_flops
from mae.report.intervals import interval
from mae.report.members import Member, Sweep
from mae.report.paper_results import PUBLISHED

SWEEP = "table1"  # the sweep's name
PAPER_FLOPS = 3.3  # of mask tokens in the encoder, over the default (table 1c)
DEFAULT = "default"  # the member that all tables share
STAGES = ("finetune", "linprobe")


@dataclass(frozen=True)
class PaperTable:
    """One of the six tables."""

    letter: str
    title: str
    published: str  # key of PUBLISHED
    rows: Mapping[str, tuple[float | str, str]]  # member -> published value, and the row's text


TABLES = (
    PaperTable(
        "a",
        "Decoder depth (blocks)",
        "model.decoder_depth",
        {
            "decoder_depth_1": (1, "1"),
            "decoder_depth_2": (2, "2"),
            "decoder_depth_4": (4, "4"),
            DEFAULT: (8, "8"),
            "decoder_depth_12": (12, "12"),
        },
    ),
    PaperTable(
        "b",
        "Decoder width",
        "model.decoder_embed_dim",
        {
            "decoder_width_1_of_8": (128, "128"),
            "decoder_width_2_of_8": (256, "256"),
            DEFAULT: (512, "512"),
            "decoder_width_6_of_8": (768, "768"),
            "decoder_width_8_of_8": (1024, "1024"),
        },
    ),
    PaperTable(
        "c",
        "Mask token",
        "model.mask_tokens",
        {"mask_tokens_in_encoder": ("encoder", "encoder with mask tokens"), DEFAULT: ("decoder", "encoder without")},
    ),
    PaperTable(
        "d",
        "Reconstruction target",
        "target",
        {
            DEFAULT: ("pixels_plain", "pixel (without norm)"),
            "pixels_normalised": ("pixels_normalised", "pixel (with norm)"),
            "pca": ("pca", "PCA"),
            "tokens": ("tokens", "dVAE token"),
        },
    ),
    PaperTable(
        "e",
        "Data augmentation",
        "task.augmentation",
        {
            "augmentation_none": ("none", "none"),
            "augmentation_fixed_crop": ("fixed_crop", "crop, fixed size"),
            DEFAULT: ("pretrain", "crop, random size"),
            "augmentation_color_jitter": ("color_jitter", "crop, random size + colour jitter"),
        },
    ),
    PaperTable(
        "f",
        "Mask sampling",
        "masking",
        {
            DEFAULT: ("random", "random, 75 %"),
            "masking_block_0.5": ("block_0.5", "block, 50 %"),
            "masking_block": ("block", "block, 75 %"),
            "masking_grid": ("grid", "grid, 75 %"),
        },
    ),
)


class PaperTables(TypedDict):
    """What the page of a sweep shows of table 1."""

    tables: list[dict[str, Any]]
    about: str


def paper_tables(sweep: Sweep) -> PaperTables | None:
    """The six tables, as the page of a sweep reads them; None for another sweep.

    A row holds its text, whether it is the default setting, the member, and [ours, the paper's] of each stage.
    """
    if SWEEP not in sweep.keys:
        return None
    members: dict[str, list[Member]] = {}
    for member in sweep.members:
        members.setdefault(str(member.values[SWEEP]), []).append(member)
    tables = []
    for table in TABLES:
        points = {stage: PUBLISHED[table.published][stage].points for stage in STAGES}
        rows = [
            {
                "text": row_text(table, text, members.get(name, [])) + flops_text(table, name, members),
                "default": name == DEFAULT,
                "member": members[name][0].name if name in members else None,
                "results": [[result(members.get(name, []), stage), points[stage][value]] for stage in STAGES],
            }
            for name, (value, text) in table.rows.items()
        ]
        tables.append({"letter": table.letter, "title": table.title, "rows": rows})
    return {"tables": tables, "about": about(sweep, members)}


def row_text(table: PaperTable, text: str, members: list[Member]) -> str:
    """The paper's text of a row, with our own width where that is another."""
    if table.letter != "b" or not members:
        return text
    width = members[0].cfg.model.decoder_embed_dim
    return text if str(width) == text else f"{text} (ours {width})"


def flops_text(table: PaperTable, name: str, members: Mapping[str, list[Member]]) -> str:
    """The column FLOPs of table 1c as a part of the row: ours over the default's, and the paper's."""
    if table.letter != "c" or name not in members or DEFAULT not in members:
        return ""
    default, member = members[DEFAULT][0], members[name][0]
    counts = member_flops([default, member])
    if not {default.name, member.name} <= counts.keys():
        return ""
    factor = counts[member.name] / counts[default.name]
    return f", {factor:.1f}x FLOPs" + ("" if name == DEFAULT else f" (the paper's {PAPER_FLOPS:.1f}x)")


def result(members: list[Member], stage: str) -> float | None:
    """Top-1 of a stage, the mean over seeds; None where no member has it."""
    values = [member.results[f"{stage} top1"] for member in members if f"{stage} top1" in member.results]
    return statistics.fmean(values) if values else None


def about(sweep: Sweep, members: Mapping[str, list[Member]]) -> str:
    """What the numbers are of, and how far those of one seed may be off."""
    cfg = sweep.members[0].cfg
    stages = sweep.members[0].record.summary.get("stages", {})
    epochs = stages.get("pretrain", {}).get("epochs")
    length = f", pre-trained for {epochs:g} epoch{'s' * (epochs != 1)}" if epochs else ""
    text = (
        "Top-1 accuracy (%), fine-tuned (ft) and linear probe (lin). "
        f"Ours: {cfg.model.name} on {cfg.data.name}{length}. "
        "The paper's: ViT-L/16 on ImageNet-1k, 800 epochs. Grey rows are its default setting."
    )
    default = members.get(DEFAULT, [])
    intervals = [
        f"{low:.1f} to {high:.1f} % ({stage})"
        for member in default
        for stage, name in (("ft", "finetune top1"), ("lin", "linprobe top1"))
        if name in member.results and name in member.images
        for low, high in [interval(member.results[name], member.images[name])]
    ]
    if len(default) != 1 or not intervals:
        return text
    images = next(iter(default[0].images.values()))
    return f"{text} The default's 95 % intervals of {images:,} images: {', '.join(intervals)}."
