"""The model card that goes with every exported file: recipe, data and results of the run it comes from."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from torch import nn

from mae.models.mae import MaskedAutoencoder
from mae.models.segmenter import Segmenter
from mae.runs.checkpoints import MANIFEST, RUN_CONFIG, step_name
from mae.runs.files import read_json
from mae.runs.layout import CONFIG, SUMMARY
from mae.weights.export_state import architecture
from mae.weights.metadata import Settings, section

PAPER = "[Masked Autoencoders Are Scalable Vision Learners](https://arxiv.org/abs/2111.06377)"
SECTIONS = ("task", "model", "optimizer", "augmentation", "data")  # sections of the config, in this order


@dataclass(frozen=True)
class Facts:
    """What a card and a config say of exported weights."""

    name: str  # of the model, as in model.name
    source: str  # what they were read from, in words
    mean: list[float]  # of a channel, values in [0, 1]: what inputs are normalised by
    std: list[float]
    classes: list[str] = field(default_factory=list)  # names in the order of the logits
    config: Settings = field(default_factory=dict)  # the run's config.yaml
    summary: Settings = field(default_factory=dict)  # the run's summary.json
    crop: float = 0.875  # the share of a side that is kept in evaluation; 224 / 256: the reference's
    encoder_only: bool = False  # a masked autoencoder whose decoder is not the weights' own, and is left out
    top: float | None = 255.0  # what values are divided by before `mean`: 65535 of 16 bits, 1 of floats, None: unknown
    mask_ratio: float | None = None  # that the decoder learned at; None: unknown
    norm_pix_loss: bool | None = None  # whether the decoder predicts normalised pixels; None: unknown


def run_facts(run: Path | None, step: int | None) -> dict[str, Settings]:
    """`config` and `summary` of the run that weights come from, or of a checkpoint outside of it; {} of others.

    The summary is {} where the weights are of another `step` than the run's last.
    """
    if run is None:
        return {}
    config = run / CONFIG
    settings = yaml.safe_load(config.read_text()) if config.is_file() else read_json(run / MANIFEST)[RUN_CONFIG]
    summary = read_json(run / SUMMARY)
    ended = step is None or str(summary.get("checkpoint")).endswith(step_name(step))
    return {"config": settings, "summary": summary if ended else {}}


def card(model: nn.Module, facts: Facts, library: str, usage: str, encoder_alone: bool = False) -> str:
    """The model card in Markdown, with the header that model hubs read. Holds no date: same facts, same card.

    `encoder_alone`: the format holds the encoder of a masked autoencoder without its decoder.
    """
    classes = architecture(model).num_classes
    kind, what = "image-feature-extraction", "masked autoencoder (self-supervised)"
    if isinstance(model, Segmenter):
        kind, what = "image-segmentation", "semantic segmenter"
    elif classes:
        kind, what = "image-classification", "image classifier"
    encoder_alone = facts.encoder_only or (encoder_alone and isinstance(model, MaskedAutoencoder))
    alone = " This file holds the encoder alone." if encoder_alone else ""
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: {kind}\ntags:\n- vision\n- vit\n- mae\n---",
        f"# {facts.name}\n\nA vision transformer, {what}, after {PAPER}.\nWeights: {facts.source}.{alone}",
        f"## Use\n\n{_sizes(model, facts)} Inputs are {_inputs(facts)}, less mean {_list(facts.mean)}, over std "
        f"{_list(facts.std)}.",
        f"```python\n{usage.strip()}\n```",
        _results(facts),
        _recipe(facts),
    ]
    if facts.classes:
        names = ", ".join(facts.classes[:20]) + (", ..." if len(facts.classes) > 20 else "")
        parts.insert(4, f"{len(facts.classes)} classes: {names}.")
    return "\n\n".join(parts) + "\n"


def _sizes(model: nn.Module, facts: Facts) -> str:
    """How an image is cropped. A segmenter takes whole images."""
    height, width = architecture(model).encoder.img_size
    if isinstance(model, Segmenter):
        return f"Its windows are {height} x {width} pixels."
    covered = " x ".join(str(int(side / facts.crop)) for side in (height, width))
    return (
        f"Images are resized to cover {covered} pixels (height x width), of which the centre {height} x {width} is cut "
        "out."
    )


def _inputs(facts: Facts) -> str:
    if facts.top == 255:
        return "RGB values in [0, 1]" if len(facts.mean) == 3 else "in [0, 1]"
    if facts.top == 1:
        return "the images' own floating values"
    return "values of 16 bits over 65535" if facts.top else "as in training"


def _list(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def _results(facts: Facts) -> str:
    if not facts.summary:
        return "## Results\n\nNot known: these weights are not those that a finished run ended with."
    rows = [f"| {key} | {_value(value)} |" for key, value in facts.summary.items() if not _is_path(key, value)]
    return "\n".join(["## Results", "", "| figure | value |", "|---|---|", *rows])


def _is_path(key: str, value: object) -> bool:
    """Whether a value is a path on the machine that trained, which tells a reader nothing."""
    return key in ("checkpoint", "root", "path") or (isinstance(value, str) and value.startswith(("/", "~", ".")))


def _recipe(facts: Facts) -> str:
    rows = [
        f"| {group}.{key} | {_value(value)} |"
        for group in SECTIONS
        for key, value in section(facts.config, group).items()
        if value is not None and not _is_path(key, value)
    ]
    if not rows:
        return "## Recipe\n\nNot known: these weights do not come from a run of this project."
    return "\n".join(["## Recipe and data", "", "| setting | value |", "|---|---|", *rows])


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_value(v)}" for k, v in value.items())
    return str(value).replace("|", "\\|")
