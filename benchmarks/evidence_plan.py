"""What `benchmarks/evidence.py` runs: each section's commands, in waves that need the results of earlier waves.

In a command `DIR` stands for the images and `RUNS` for the directory of all runs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TRIALS, TRIAL_EPOCHS = 8, 6  # of each search; a third of the epochs of the runs that it is for
SEEDS, TABLE_SEEDS = 3, 2
STARTS = ("mae", "scratch")
# labels of a class -> epochs: 500 labels take a third of the steps of 5,000, and 50,000 half as many again
LABELS = {50: 60, 500: 20, None: 3}
SEARCHED = (
    "optimizer.base_lr=tag(log,interval(5e-4,2e-2))",
    "optimizer.weight_decay=tag(log,interval(0.01,0.3))",
    "optimizer.layer_decay=interval(0.6,1.0)",
    "task.drop_path=interval(0.0,0.2)",
    "task.label_smoothing=choice(0.0,0.1)",
    "augmentation=pretrain,finetune",
)
# start -> the values of its first trial, which were tried by hand
FIRST = {
    "mae": "optimizer.base_lr=8e-3 optimizer.layer_decay=0.85",
    "scratch": "optimizer.base_lr=2.4e-3 optimizer.layer_decay=1.0",
}
FIRST_OF_BOTH = "optimizer.weight_decay=0.05 task.drop_path=0.0 task.label_smoothing=0.1 augmentation=pretrain"
# rates of probes, of which the best on the test images counts
PROBE_RATES = "task.learning_rates=[0.1,0.3,1.0,3.0,10.0,30.0,100.0]"
TINY_NETWORK = ("model.embed_dim=96", "model.depth=1")

# member of table 1 -> its changes of experiment=cifar10_pretrain; the paper's default does not normalise pixels
PLAIN = "task.norm_pix_loss=false"
MEMBERS = {
    "default": (PLAIN,),
    "block_0.5": (PLAIN, "masking=block", "task.mask_ratio=0.5"),
    "block": (PLAIN, "masking=block"),
    "grid": (PLAIN, "masking=grid"),
    "pixels_normalised": ("task.norm_pix_loss=true",),
    "pca": (PLAIN, "target=pca"),
    "hog": (PLAIN, "target=hog"),
    "cross": (PLAIN, "model.decoder=cross"),
    "mask_ratio_0.5": (PLAIN, "task.mask_ratio=0.5"),
    "mask_ratio_0.9": (PLAIN, "task.mask_ratio=0.9"),
}
TABLE_EPOCHS, TABLE_TUNING_EPOCHS = 4, 5
DECODERS = ("cross, predict_ratio 0.75", "cross, predict_ratio 0.25")  # rows of benchmarks/decoders.py


@dataclass(frozen=True)
class Job:
    """A program of this repository with its arguments; `name` is its directory in RUNS and its key in the JSON."""

    name: str
    words: tuple[str, ...]  # after `python`
    seed: int = 0
    start: "Job | None" = None  # the pre-training whose checkpoint it reads

    @property
    def command(self) -> str:
        return " ".join(["python", *(f"'{word}'" if set(word) & set("(), ") else word for word in self.words)])

    @property
    def searches(self) -> bool:
        return self.words[:2] == ("-m", "mae.search")


Waves = Iterator[list[Job]]


@dataclass(frozen=True)
class Plan:
    """The sections, of which each yields a wave and goes on when `results` (name -> result) has it."""

    results: Mapping[str, Mapping[str, Any]]
    tiny: bool = False

    def run(self, name: str, *overrides: str, seed: int = 0, start: Job | None = None) -> Job:
        """A run of run.py."""
        words = ("run.py", *overrides, *initial(start), f"seed={seed}", f"output_dir=RUNS/{name}")
        return Job(name, words, seed, start)

    def network(self, experiment: str, epochs: int) -> tuple[str, ...]:
        """An experiment on the images, validated at its end alone; tiny for a test of the plumbing."""
        network = TINY_NETWORK if self.tiny else ()
        count, warmup = (1, 0) if self.tiny else (epochs, max(1, epochs // 10))
        schedule = (f"task.epochs={count}", f"task.warmup_epochs={warmup}", f"task.eval_every_epochs={count}")
        return (f"experiment={experiment}", "data.root=DIR", *network, *schedule)

    def pretraining(self, name: str = "pretrain", *changes: str, epochs: int = 15, seed: int = 0) -> Job:
        return self.run(name, *self.network("cifar10_pretrain", epochs), *changes, seed=seed)

    def finetuning(self, name: str, *changes: str, epochs: int = 20, seed: int = 0, start: Job | None = None) -> Job:
        return self.run(name, *self.network("cifar10_finetune", epochs), *changes, seed=seed, start=start)

    def start(self, name: str) -> Job | None:
        """The pre-training that a start goes on from: one of STARTS."""
        return self.pretraining() if name == "mae" else None

    def search(self, start: str) -> Job:
        """A search on a tenth of the training images, held out: no test image chooses a value."""
        network = self.network("cifar10_finetune", TRIAL_EPOCHS)
        held_out = ("data.root=DIR/train", "data.val_fraction=0.1", "task.eval_every_epochs=2")
        fixed = [word for word in network if not word.startswith(("data.root=", "task.eval_every_epochs="))]
        trials = f"--trials={2 if self.tiny else TRIALS}"
        pretraining = self.start(start)
        words = (
            "-m",
            "mae.search",
            f"RUNS/search_{start}",
            trials,
            "--first",
            f"{FIRST[start]} {FIRST_OF_BOTH}",
            *fixed,
            *held_out,
            *initial(pretraining),
            *SEARCHED,
        )
        return Job(f"search_{start}", words, start=pretraining)

    def tuned(self, start: str, per_class: int | None, seed: int) -> Job:
        """A run on the test images with the values that the start's search chose."""
        values = self.results[f"search_{start}"]["overrides"]
        labels = f"data.per_class={'null' if per_class is None else per_class}"
        name = f"labels/{start}_{10 * (per_class or 5000)}_seed_{seed}"
        return self.finetuning(name, labels, *values, epochs=LABELS[per_class], seed=seed, start=self.start(start))

    # ------------------------------------------------------------ sections

    def untuned(self) -> Waves:
        few = "data.per_class=500"
        rates = {"mae": (), "scratch": ("optimizer.layer_decay=null", "optimizer.base_lr=2.4e-3")}
        yield [
            self.finetuning(f"untuned/{start}_seed_{seed}", few, *rates[start], seed=seed, start=self.start(start))
            for seed in range(SEEDS)
            for start in STARTS
        ]

    def scratch(self) -> Waves:
        yield [self.search(start) for start in STARTS]
        yield [self.tuned(start, 500, seed) for seed in range(SEEDS) for start in STARTS]

    def labels(self) -> Waves:
        yield from self.scratch()
        yield [self.tuned(start, count, seed) for count in LABELS for seed in range(SEEDS) for start in STARTS]

    def probes(self) -> Waves:
        few, start = "data.per_class=500", self.pretraining()
        yield [
            self.finetuning("probes/finetune", few, start=start),
            self.run("probes/knn", "task=knn", few, start=start),
            self.linear("probes/linear", few, start=start),
            self.linear("probes/attentive", few, "task.probe=attentive", start=start),
        ]

    def linear(self, name: str, *overrides: str, start: Job, seed: int = 0) -> Job:
        """A probe on features that are computed once."""
        cached = ("task.cached_features=true", PROBE_RATES)
        epochs = ("task.epochs=1", "task.warmup_epochs=0") if self.tiny else ("task.epochs=90",)
        return self.run(name, "task=linprobe", *overrides, *epochs, *cached, seed=seed, start=start)

    def table1(self) -> Waves:
        few = "data.per_class=500"
        cases = [(member, seed) for seed in range(TABLE_SEEDS) for member in MEMBERS]
        starts = {
            f"table1/{member}_seed_{seed}": self.pretraining(
                f"table1/{member}_seed_{seed}/pretrain", *MEMBERS[member], epochs=TABLE_EPOCHS, seed=seed
            )
            for member, seed in cases
        }
        yield [
            job
            for name, start in starts.items()
            for job in (
                self.finetuning(f"{name}/finetune", few, epochs=TABLE_TUNING_EPOCHS, seed=start.seed, start=start),
                self.linear(f"{name}/linear", few, seed=start.seed, start=start),
            )
        ]

    def speed(self) -> Waves:
        rounds = ("--rounds", "1", "--batch", "1") if self.tiny else ()
        yield [Job("speed", ("benchmarks/decoders.py", "--json", "RUNS/speed/rows.json", *rounds, "--only", *DECODERS))]


def initial(start: Job | None) -> tuple[str, ...]:
    return (f"init=RUNS/{start.name}",) if start else ()


SECTIONS: dict[str, Callable[[Plan], Waves]] = {
    "untuned": Plan.untuned,
    "scratch": Plan.scratch,
    "labels": Plan.labels,
    "probes": Plan.probes,
    "table1": Plan.table1,
    "speed": Plan.speed,
}
