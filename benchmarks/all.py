"""The whole scoreboard: every benchmark in a process of its own, one table, and all rows as JSON.

python benchmarks/all.py PHOTOS --json scoreboard.json

PHOTOS is a folder of JPEGs for the rows that load data. Takes about half an hour on two idle cores with bfloat16.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from protocol import Row, report

HERE = Path(__file__).parent
BENCHMARKS = ["step", "memory", "loader", "optimizer", "checkpoint", "finetune", "end_to_end", "scaling"]
WITH_PHOTOS = ("loader", "end_to_end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    rows: list[Row] = []
    failed: list[str] = []
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryDirectory() as folder:
        for benchmark in args.only:
            json_file = Path(folder) / f"{benchmark}.json"
            command = [sys.executable, str(HERE / f"{benchmark}.py"), "--json", str(json_file)]
            command += [str(args.photos.absolute())] if benchmark in WITH_PHOTOS else []
            command += ["--device", args.device] if benchmark != "loader" else []
            print(f"\n== {' '.join(command[1:2])}", flush=True)
            if subprocess.run(command, env=env).returncode:
                failed.append(benchmark)
            else:
                entries = json.loads(json_file.read_text())
                rows += [Row(**entry) for entry in entries if "row" in entry]  # scaling prints its own table only
    print("\nScoreboard")
    report(sorted(rows, key=lambda row: row.row), args.json)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
