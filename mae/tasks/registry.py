"""What the program knows of a task before it imports it: a new task is a file, `conf/task/NAME.yaml` and an entry here.

Imports no torch: the command line, the launchers and the reports read it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TRAINING_GROUPS = ("optimizer", "augmentation")
AUTOENCODER_GROUPS = ("masking", "target")


@dataclass(frozen=True)
class Metric:
    """A result of a task, by which runs are compared."""

    key: str  # in summary.json; `val/KEY` in metrics.jsonl
    title: str  # on the axis of a figure
    lower_is_better: bool = False


@dataclass(frozen=True)
class TaskEntry:
    """Facts about one task."""

    path: str  # `module:name` in mae/: a TrainedTask, or a function of (run, cfg, ranks, tracker)
    title: str  # in figures and tables
    about: str  # a sentence for the reference: what it does and leaves
    trains: bool = False  # a TrainedTask, which `engine.train` takes through its steps
    stage: bool = False  # may be a stage of task=pipeline
    needs_init: bool = False
    needs_labels: bool = False  # of the training and the validation images
    classifier: bool = False  # leaves a checkpoint that task=evaluate can read
    uses: tuple[str, ...] = ()  # groups that only some tasks use; TRAINING_GROUPS come with `trains`
    reads_images: bool = True  # of the data, not its settings alone
    smallest_batch: int = 1  # images that one device must hold at a time in training; 2 where a batch is normalised
    metric: Metric | None = None  # its main result
    closing_key: str | None = None  # in summary.json: what the last line of a run shows, where there is no metric
    next_commands: tuple[str, ...] = ()  # what to type after it; RUN stands for the run's directory

    def used_groups(self) -> tuple[str, ...]:
        """Of the groups that only some tasks use, those of this one."""
        return (*self.uses, *(TRAINING_GROUPS if self.trains else ()))


TOP1 = Metric("top1", "top-1 accuracy (%)")
KNN = Metric("knn", "k-NN accuracy (%)")
VAL_LOSS = Metric("val_loss", "validation loss", lower_is_better=True)

MIOU = Metric("miou", "mean IoU (%)")

EVALUATE = "python run.py task=evaluate init=RUN"

# Order matters: the first task whose metric a sweep has is the one it compares. Add a new task at the end.
TASKS = {
    "finetune": TaskEntry(
        "tasks.finetune:Finetune",
        "fine-tuning",
        "Trains a classifier on labels: the whole network or its last blocks, from `init` or from scratch.",
        trains=True,
        stage=True,
        needs_labels=True,
        classifier=True,
        metric=TOP1,
        next_commands=(EVALUATE, "python run.py task=export init=RUN"),
    ),
    "linprobe": TaskEntry(
        "tasks.linprobe_layers:linprobe",
        "linear probe",
        "Trains a linear or attentive classifier on the features of a frozen encoder, from one block or several.",
        trains=True,
        stage=True,
        needs_init=True,
        needs_labels=True,
        classifier=True,
        smallest_batch=2,
        metric=TOP1,
        next_commands=(EVALUATE,),
    ),
    "knn": TaskEntry(
        "tasks.knn:knn",
        "k-NN",
        "Classifies validation images by the labels of the nearest training images; nothing is trained.",
        stage=True,
        needs_init=True,
        needs_labels=True,
        metric=KNN,
    ),
    "pretrain": TaskEntry(
        "tasks.pretrain:Pretrain",
        "pre-training",
        "Trains encoder and decoder to predict the masked patches; no labels are needed.",
        uses=AUTOENCODER_GROUPS,
        trains=True,
        stage=True,
        metric=VAL_LOSS,
        next_commands=(
            "python run.py task=finetune init=RUN     # or linprobe, knn, visualize, export",
            "python run.py task.mask_ratio=0.5        # the same with one number changed",
        ),
    ),
    "evaluate": TaskEntry(
        "tasks.evaluate:evaluate",
        "evaluation",
        "Measures a classifier or segmenter on labelled images: accuracy, loss, calibration, and each class.",
        stage=True,
        needs_init=True,
        metric=TOP1,
    ),
    "visualize": TaskEntry(
        "tasks.visualize:visualize",
        "pictures",
        "Draws original, masked image and reconstruction of some images, as PNG files and one page.",
        uses=AUTOENCODER_GROUPS,
        stage=True,
        needs_init=True,
        closing_key="page",
    ),
    "export": TaskEntry(
        "tasks.export:export",
        "export",
        "Writes the model as one file for timm, transformers, ONNX and others, with a model card.",
        stage=True,
        needs_init=True,
        reads_images=False,
        closing_key="files",
    ),
    "stats": TaskEntry(
        "tasks.stats:stats",
        "statistics",
        "Measures mean and standard deviation of the training images, and lists the files that cannot be read.",
        uses=("target",),
        closing_key="use",
    ),
    "inspect": TaskEntry(
        "tasks.inspect:inspect",
        "inspection",
        "Draws samples as the model sees them and counts classes and sizes, before anything is trained.",
        uses=(*TRAINING_GROUPS, *AUTOENCODER_GROUPS),
        closing_key="files",
    ),
    "embed": TaskEntry(
        "tasks.embed:embed",
        "features",
        "Writes the features of each image as a table or an array.",
        needs_init=True,
        closing_key="files",
    ),
    "predict": TaskEntry(
        "tasks.predict:predict",
        "labels",
        "Writes the most probable classes of each image, or the map of classes of a segmenter.",
        needs_init=True,
        closing_key="files",
    ),
    "pipeline": TaskEntry(
        "launch.pipeline:pipeline",
        "pipeline",
        "Runs several tasks in order, each from the checkpoint before it.",
        uses=AUTOENCODER_GROUPS,
    ),
    "segment": TaskEntry(
        "tasks.segment:Segment",
        "segmentation",
        "Trains a segmenter on images with maps of classes: the whole network, or a head on a frozen encoder.",
        trains=True,
        metric=MIOU,
        next_commands=(
            EVALUATE,
            "python run.py task=predict init=RUN",
            "python run.py task=export init=RUN task.format=onnx",
        ),
    ),
}
METRICS = {entry.metric.key: entry.metric for entry in TASKS.values() if entry.metric is not None}


def names(**facts: bool) -> list[str]:
    """The tasks of which all `facts` hold, such as `names(trains=True)`."""
    return [name for name, entry in TASKS.items() if all(getattr(entry, fact) is facts[fact] for fact in facts)]


def load_task(name: str) -> Callable[..., Any]:
    """The class of a trained task, or the function that any other task is; imported only now."""
    module, _, attribute = TASKS[name].path.partition(":")
    return getattr(importlib.import_module(f"mae.{module}"), attribute)


def closing_keys() -> list[str]:
    """Keys of summary.json, of which the last line of a run shows the first that is there."""
    return list(dict.fromkeys([*METRICS, *(entry.closing_key for entry in TASKS.values() if entry.closing_key)]))
