"""The page of `benchmarks/evidence.py`, written from its JSON file alone."""

import re
import statistics
from collections.abc import Mapping
from pathlib import Path

from evidence_plan import LABELS, SEEDS, STARTS, TRIAL_EPOCHS
from evidence_table1 import Lines, Records, each, table1

from mae.report.intervals import interval
from mae.runs.files import write_json, write_text

TITLES = {"mae": "masked autoencoder, `init=`", "scratch": "from scratch"}
QUESTIONS = {
    "untuned": "What is pre-training worth on 5,000 labels, at rates tried by hand?",
    "scratch": "What is it worth where both starts are tuned with the same budget?",
    "labels": "How does that depend on the number of labels?",
    "probes": "What do a linear probe, k-NN and fine-tuning say of the same checkpoint?",
    "table1": "Which findings of the paper's table 1 show at this scale?",
    "speed": "What does a step of the decoder `cross` cost, beside `self`?",
}
INTRODUCTION = """\
# Results on CIFAR-10

`benchmarks/evidence.py` writes this page, and all numbers in it come from [its records]({json}). A record has the
command, commit, seed, machine and seconds. `DIR` holds CIFAR-10 as `train/CLASS/*.jpg` and `test/CLASS/*.jpg`; `RUNS`
is the directory of the runs. The network is that of `experiment=cifar10_pretrain`.

```
python benchmarks/evidence.py DIR --hours 10          # all sections; the same command goes on the next night
python benchmarks/evidence.py DIR --only probes       # one section
python benchmarks/evidence.py --json runs/evidence/results.json --page docs/results.md
```

Killed runs resume from their checkpoints. Finished runs are not run again."""
UNFINISHED = "We have not yet run all of it, so we cannot say how many hours it takes."
FINISHED = "Its timed runs took {hours:.0f} hours in all. Up to two of them shared two cores."


def write_evidence_page(page: Path, records: Records) -> None:
    """Writes the page, a copy of the records beside it and, where section labels has run, its figure."""
    results = {name: record for name, record in records.items() if record.get("result")}
    write_json(page.with_suffix(".json"), records, indent=1)
    figure = page.with_name(f"{page.stem}_labels.png")
    texts = {
        "untuned": starts_table(results, "untuned/{start}_seed_"),
        "scratch": scratch(results),
        "labels": labels(results, figure),
        "probes": probes(results),
        "table1": table1(results) and [*table1(results), *origin(results, "table1/")],
        "speed": speed(results),
    }
    lines = [*INTRODUCTION.format(json=page.with_suffix(".json").name).splitlines()]
    hours = sum(record["seconds"] or 0 for record in results.values()) / 3600
    lines += ["", FINISHED.format(hours=hours) if all(texts.values()) else UNFINISHED, ""]
    lines += ["| section | question | state |", "|---|---|---|"]
    tuned = so_far(results, *(f"labels/{start}_5000_" for start in STARTS))
    begun = {
        "scratch": [*searches(results), *([""] if tuned else []), *tuned],
        "labels": so_far(results, "labels/"),
        "table1": so_far(results, "table1/"),
    }
    for name, text in texts.items():
        state = "run" if text else "**in part**" if begun.get(name) else "**not run yet**"
        lines.append(f"| {name} | {QUESTIONS[name]} | {state} |")
    for name, text in texts.items():
        command = f"`python benchmarks/evidence.py DIR --only {name}`"
        first = begun.get(name, [])
        rest = [*first, "", f"The rest is not run yet: {command}."] if first else [f"Not run yet: {command}."]
        lines += ["", f"## {QUESTIONS[name]}", "", *(text or rest)]
    write_text(page, "\n".join(lines) + "\n")


def origin(results: Records, *prefixes: str) -> Lines:
    """Where the numbers under a table are from."""
    names = [name for name in results if name.startswith(prefixes)]
    values = {
        key: [text for text in dict.fromkeys(str(results[n].get(key) or "") for n in names) if text]
        for key in ("commit", "machine", "origin")
    }
    seconds = sum(results[name]["seconds"] or 0 for name in names)
    lines = ["", f"Commit {', '.join(values['commit'])}, on {'; '.join(values['machine'])}."]
    length = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
    timed = sum(bool(results[name]["seconds"]) for name in names)
    lines += [f"{timed} timed record{'s' * (timed > 1)}, {length} of runs in all."] if seconds else []
    lines += [f"{text}." for text in values["origin"]]
    return [*lines, f"The first command is `{results[names[0]]['command']}`."]


def scores(results: Records, prefix: str) -> list[float]:
    """Top-1 of each seed, in their order; a pre-training has none."""
    chosen = [results[name]["result"] for name in sorted(results) if name.startswith(prefix)]
    return [result["top1"] for result in chosen if "top1" in result]


def starts_table(results: Records, prefix: str) -> Lines:
    """Top-1 on the test images from both starts; empty unless all seeds of both have run."""
    tops = {start: scores(results, prefix.format(start=start)) for start in STARTS}
    if any(len(top) < SEEDS for top in tops.values()):
        return []
    lines = ["| start | top-1 of each seed | mean |", "|---|---|---|"]
    lines += [f"| {TITLES[start]} | {each(top)} | {statistics.mean(top):.2f} |" for start, top in tops.items()]
    return lines + origin(results, *(prefix.format(start=start) for start in STARTS))


def so_far(results: Records, *prefixes: str) -> Lines:
    """What has run of a section that is not finished; empty where nothing has."""
    tops: dict[str, list[float]] = {}
    for name in sorted(results):
        if name.startswith(prefixes) and (top := scores({name: results[name]}, name)):
            tops.setdefault(re.sub(r"_seed_\d+", "", name), []).extend(top)
    if not tops:
        return []
    rows = [f"| {name} | {each(values)} |" for name, values in tops.items()]
    return ["| run | top-1 of each seed so far |", "|---|---|", *rows, *origin(results, *prefixes)]


def searches(results: Records) -> Lines:
    """The searches that have run; empty where none has."""
    starts = [start for start in STARTS if f"search_{start}" in results]
    if not starts:
        return []
    lines = [
        f"Each start was searched with as many trials of {TRIAL_EPOCHS} epochs, on a tenth of the training images held "
        "out. The first trial has the values tried by hand. Trials worse than the median are ended early.",
        "",
    ]
    lines += [
        "| start | trials | run to the end | best on held-out images | values | hours |",
        "|---|---|---|---|---|---|",
    ]
    for start in starts:
        record = results[f"search_{start}"]
        best, values = record["result"], " ".join(f"`{word}`" for word in record["result"]["overrides"])
        lines.append(
            f"| {TITLES[start]} | {best['trials']} | {best['finished']} | {best['top1']:.2f} | {values} | "
            f"{record['seconds'] / 3600:.1f} |"
        )
    return lines


def scratch(results: Records) -> Lines:
    """The two searches, and the gain over the better result from scratch."""
    prefix = "labels/{start}_5000_seed_"
    table = starts_table(results, prefix)
    if not table:
        return []
    means = {name: statistics.mean(scores(results, name)) for name in (prefix.format(start=start) for start in STARTS)}
    mae, tuned = means.values()
    by_hand = scores(results, "untuned/scratch_seed_")
    best_scratch = max(tuned, statistics.mean(by_hand)) if by_hand else tuned
    gain = f"Pre-training gains {mae - best_scratch:.1f} points over the better mean from scratch, tuned or by hand."
    return [
        *searches(results),
        "",
        "With these values, trained on 5,000 labels and measured on the test images:",
        "",
        *table,
        "",
        gain,
    ]


def labels(results: Records, figure: Path) -> Lines:
    """Top-1 against the number of labels, as a table and a figure."""
    counts = [10 * (count or 5000) for count in LABELS]
    tops = {(start, n): scores(results, f"labels/{start}_{n}_seed_") for start in STARTS for n in counts}
    if any(len(top) < SEEDS for top in tops.values()):
        return []
    draw_labels(counts, tops, figure)
    lines = [f"![Top-1 against the number of labels]({figure.name})", ""]
    lines += ["| labels | " + " | ".join(TITLES[start] for start in STARTS) + " | gain |", "|---|---|---|---|"]
    for n in counts:
        mae, scratch = (statistics.mean(tops[start, n]) for start in STARTS)
        columns = " | ".join(f"{each(tops[start, n])}, mean {statistics.mean(tops[start, n]):.2f}" for start in STARTS)
        lines.append(f"| {n:,} | {columns} | {mae - scratch:+.1f} |")
    epochs = ", ".join(f"{count} for {n:,} labels" for n, count in zip(counts, LABELS.values(), strict=True))
    lines += ["", f"Epochs: {epochs}. The values are those that section scratch chose on 5,000 labels."]
    return lines + origin(results, "labels/")


def draw_labels(counts: list[int], tops: Mapping[tuple[str, int], list[float]], figure: Path) -> None:
    """The mean of the seeds with the least and the greatest."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5, 3.5), layout="constrained")
    axes = drawing.subplots()
    for start, colour in zip(STARTS, ("#2563a8", "#d9662b"), strict=True):
        means = [statistics.mean(tops[start, n]) for n in counts]
        spread = [
            [mean - min(tops[start, n]) for n, mean in zip(counts, means, strict=True)],
            [max(tops[start, n]) - mean for n, mean in zip(counts, means, strict=True)],
        ]
        axes.errorbar(counts, means, spread, marker="o", capsize=3, color=colour, label=TITLES[start].partition(",")[0])
    axes.set(xscale="log", xlabel="labelled images", ylabel="top-1 accuracy (%)")
    axes.legend()
    drawing.savefig(figure, dpi=150)


def probes(results: Records) -> Lines:
    """Accuracies of one checkpoint with their intervals of 95 %."""
    rows = {name: record["result"] for name, record in results.items() if name.startswith("probes/")}
    if not rows:
        return []
    lines = [
        "On at most 500 labels of a class. The interval of 95 % is that of the number of test images (Wilson).",
        "Linear and attentive probes are trained at several rates, of which the best on the test images counts.",
        "",
    ]
    lines += ["| probe | top-1 | interval |", "|---|---|---|"]
    for name, result in rows.items():
        neighbours = result.get("knn")
        k, top1 = max(neighbours.items(), key=lambda item: item[1]) if neighbours else (None, result["top1"])
        low, high = interval(top1, result["val_images"])
        title = name.removeprefix("probes/") + (f", {k} neighbours" if k else "")
        lines.append(f"| {title} | {top1:.2f} | {low:.1f} to {high:.1f} |")
    return lines + origin(results, "probes/")


def speed(results: Records) -> Lines:
    """The rows of benchmarks/decoders.py."""
    record = results.get("speed")
    if record is None:
        return []
    lines = ["| measure | this decoder | `self` | ratio |", "|---|---|---|---|"]
    rows = record["result"]["rows"]
    lines += [f"| {r['name']} | {r['ours']:.4g} | {r['peer']:.4g} | {r['ratio']:.2f} |" for r in rows]
    return lines + origin(results, "speed")
