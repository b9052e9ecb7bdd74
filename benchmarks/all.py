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
PARTS = ["step", "memory", "loader", "optimizer", "checkpoint", "finetune", "end_to_end", "scaling"]
WITH_PHOTOS = ("loader", "end_to_end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    rows: list[Row] = []
    failed: list[str] = []
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            out = Path(folder) / f"{part}.json"
            command = [sys.executable, str(HERE / f"{part}.py"), "--json", str(out)]
            command += [str(args.photos.absolute())] if part in WITH_PHOTOS else []
            command += ["--device", args.device] if part != "loader" else []
            print(f"\n== {' '.join(command[1:2])}", flush=True)
            if subprocess.run(command, env=env).returncode:
                failed.append(part)
            else:
                found = json.loads(out.read_text())
                rows += [Row(**row) for row in found if "row" in row]  # scaling has a table of its own alone
    print("\nScoreboard")
    report(sorted(rows, key=lambda row: row.row), args.json)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
