"""The evidence of docs/results.md: what pre-training is worth on CIFAR-10, on two cores over night.

    python benchmarks/evidence.py DIR [--jobs 2] [--json FILE] [--only SECTION...] [--hours H] [--page FILE.md]
    python benchmarks/evidence.py --json FILE --page docs/results.md

DIR holds train/CLASS/*.jpg and test/CLASS/*.jpg. The same command goes on after a kill: runs resume from their
checkpoints, and finished ones are not run again. Their records are enough for that, on another machine too.
Every number goes to the JSON file with its command, commit, seed, machine and seconds. `--page` writes the page, its
figure and a copy of the JSON file from that file alone.
`--tiny` without DIR proves the plumbing on scikit-learn's digits; its numbers mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_page import write_evidence_page
from evidence_plan import SECTIONS, Job, Plan
from machine import machine

from mae import limits
from mae.config.overrides import key_of
from mae.report.members import read_sweep
from mae.runs.environment import revision
from mae.runs.files import read_json, write_json
from mae.runs.layout import SUMMARY
from mae.tools.search_trial import end_with_parent

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "docs" / "results.json"  # the results that a new JSON file starts from
POLL_S = 0.2


class Stopped(Exception):
    """The hours are over, or a signal came."""


@dataclass
class Process:
    """A job under way."""

    job: Job
    process: subprocess.Popen[bytes]
    output: Path
    began: float


class Runner:
    """Runs jobs, several at a time, and keeps the JSON file: name -> record."""

    def __init__(self, images: Path, runs: Path, file: Path, records: dict[str, Any], jobs: int, end: float):
        self.images, self.runs, self.file, self.records, self.jobs, self.end = images, runs, file, records, jobs, end
        self.results: dict[str, Any] = {name: record["result"] for name, record in records.items()}
        self.commit, self.machine, self.stopped = revision(), machine(), False

    def stop(self, *_: object) -> None:
        """Handles signals. A KeyboardInterrupt would be lost where it is raised in a callback of fork."""
        self.stopped = True

    def is_finished(self, job: Job) -> bool:
        """Whether the same command has left its result, here or where the records come from."""
        record = self.records.get(job.name, {})
        return bool(record.get("result")) and record["command"] == job.command

    def unfinished(self, jobs: list[Job]) -> list[Job]:
        """The jobs to run, each behind the pre-training that it starts from where that has left no run here."""
        names: dict[str, Job] = {}
        for job in jobs:
            if not self.is_finished(job):
                if job.start and not (self.is_finished(job.start) and (self.runs / job.start.name).is_dir()):
                    names.setdefault(job.start.name, job.start)
                names.setdefault(job.name, job)
        return list(names.values())

    def wave(self, jobs: list[Job]) -> list[str]:
        """Runs the jobs that are not finished; returns the names of those that failed or whose start did.

        Raises Stopped at the end of the hours or after a signal, when what runs has saved a checkpoint.
        """
        waiting = self.unfinished(jobs)
        running: list[Process] = []
        failed: list[str] = []
        try:
            while waiting or running:
                if self.stopped or time.monotonic() > self.end:
                    raise Stopped
                awaited = {job.name for job in [*waiting, *(process.job for process in running)]}
                ready = [job for job in waiting if not (job.start and job.start.name in awaited)]
                chosen = ready[: self.jobs - len(running)]
                threads = max(1, limits.cpus() // max(1, len(running) + len(chosen)))
                for job in chosen:
                    waiting.remove(job)
                    running.append(self.start(job, threads))
                time.sleep(POLL_S)
                for ended in [process for process in running if process.process.poll() is not None]:
                    running.remove(ended)
                    if not self.finish(ended):
                        stuck = [job for job in waiting if job.start == ended.job]
                        failed += [ended.job.name, *(job.name for job in stuck)]
                        waiting = [job for job in waiting if job not in stuck]
        finally:
            for process in running:
                process.process.terminate()
            for process in running:
                process.process.wait()
                self.record(process, None)
        return failed

    def start(self, job: Job, threads: int) -> Process:
        paths = {"DIR": self.images, "RUNS": self.runs}
        words = [with_paths(word, paths) for word in job.words]
        (self.runs / job.name).mkdir(parents=True, exist_ok=True)
        output = self.runs / "output" / f"{job.name.replace('/', '-')}.txt"
        output.parent.mkdir(exist_ok=True)
        print(f"{time.strftime('%H:%M:%S')} {job.command}", flush=True)
        with output.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C comes here alone
                preexec_fn=end_with_parent,  # asks for a checkpoint where this process is killed
            )
        return Process(job, process, output, time.monotonic())

    def finish(self, process: Process) -> bool:
        """Records what a job has left; returns whether it succeeded."""
        code = process.process.returncode
        result = None if code else result_of(process.job, self.runs)
        text = json.dumps(result).replace(str(self.runs), "RUNS").replace(str(self.images), "DIR")  # as in commands
        result = json.loads(text)
        self.record(process, result)
        if not result:
            print(f"failed: {process.job.name} (exit code {code}): see {process.output}", flush=True)
        return bool(result)

    def record(self, process: Process, result: dict[str, Any] | None) -> None:
        """Without a result the seconds alone, to which the next start adds its own. No result is lost to a start."""
        job, earlier = process.job, self.records.get(process.job.name, {})
        if result is None and earlier.get("result"):  # of another command, which counts until this one has a result
            return
        before = earlier["seconds"] if earlier.get("command") == job.command and not earlier["result"] else 0.0
        self.records[job.name] = {
            "command": job.command,
            "commit": self.commit,
            "seed": job.seed,
            "machine": self.machine,
            "seconds": round(before + time.monotonic() - process.began, 1),
            "result": result,
        }
        self.results[job.name] = result
        write_json(self.file, self.records, indent=1)


def with_paths(word: str, paths: Mapping[str, Path]) -> str:
    """A word of a command with directories for `DIR` and `RUNS`, at its start or after its `=`."""
    key, equals, value = word.rpartition("=")
    first, slash, rest = value.partition("/")
    return f"{key}{equals}{paths.get(first, first)}{slash}{rest}"


def result_of(job: Job, runs: Path) -> dict[str, Any] | None:
    """The summary of a run, the best values of a search, the rows of a benchmark; None where it left none."""
    if job.searches:
        sweep = read_sweep(runs / job.name)
        if sweep.best is None:
            return None
        chosen = [word for word in sweep.best.record.overrides if key_of(word) in sweep.keys]
        finished = sum(member.record.state == "finished" for member in sweep.members)
        return {"overrides": chosen, "trials": len(sweep.members), "finished": finished} | sweep.best.results
    if job.words[0] == "run.py":
        return read_json(runs / job.name / SUMMARY) or None
    return {"rows": json.loads((runs / job.name / "rows.json").read_text())}


def write_digits(directory: Path) -> Path:
    """scikit-learn's digits as JPEG files of 32 pixels, in the folders that `DIR` has."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images[:400].reshape(-1, 8, 8), classes[:400], strict=True)):
        folder = directory / ("train" if number % 4 else "test") / f"digit_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((32, 32)).convert("RGB").save(folder / f"{number}.jpg")
    return directory


def run_sections(runner: Runner, sections: list[str], tiny: bool) -> list[str]:
    """Runs the sections; returns the names of failed jobs, after which a section does not go on."""
    plan, failed = Plan(runner.results, tiny), []
    for section in sections:
        for wave in SECTIONS[section](plan):
            if bad := runner.wave(wave):
                failed += bad
                break
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", metavar="DIR", type=Path, nargs="?", help="the images; without it --page alone works")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores")
    parser.add_argument("--json", type=Path, help="records; default: results.json in the directory of the runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--hours", type=float, default=float("inf"), help="then stop; the same command goes on")
    parser.add_argument("--out", type=Path, help="directory of the runs; default: runs/evidence")
    parser.add_argument("--page", type=Path, help="write this page from the JSON file")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, one epoch, two trials")
    args = parser.parse_args()
    runs = (args.out or Path("runs/evidence_tiny" if args.tiny else "runs/evidence")).absolute()
    file = (args.json or runs / "results.json").absolute()
    runs_anything = args.root is not None or args.tiny
    if not runs_anything and (args.page is None or not file.exists()):
        parser.error("give DIR, the folder of CIFAR-10's images, or a --json FILE that exists and the --page to write")
    records = read_json(file if file.exists() or args.tiny else PUBLISHED)
    failed: list[str] = []
    if runs_anything:
        images = args.root.absolute() if args.root else write_digits(runs / "images")
        runner = Runner(images, runs, file, records, args.jobs, time.monotonic() + 3600 * args.hours)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, runner.stop)
        try:
            failed = run_sections(runner, args.only, args.tiny)
        except Stopped:
            print("Stopped. The same command goes on.")
        if runner.stopped:
            return 130
    if args.page:
        write_evidence_page(args.page, records)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
