"""docs/tour.ipynb: its commands compose, its committed outputs are whole, and it runs from first cell to last."""

import json
import shlex
import shutil

import notebook
import pytest
from conftest import ROOT, composed

TOUR = ROOT / "docs" / "tour.ipynb"


def code_cells() -> list[notebook.Cell]:
    return [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_tour_holds_small_outputs_of_all_its_cells():
    cells = code_cells()
    assert TOUR.stat().st_size < 500_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {"text": ""})]
    assert kinds.count("image/png") == 3 and "error" not in {o["output_type"] for c in cells for o in c["outputs"]}
    assert all(cell["outputs"] for cell in cells)


def test_the_commands_of_the_tour_pass_the_check():
    commands = ["".join(cell["source"]) for cell in code_cells() if cell["source"][0].startswith("!mae ")]
    assert len(commands) == 3
    for command in commands:
        composed(*shlex.split(command.partition(" 2>&1")[0])[1:])


def test_a_failing_cell_ends_the_execution(tmp_path):
    def notebook_of(source: str) -> dict[str, list[notebook.Cell]]:
        return {"cells": [{"cell_type": "code", "source": [source]}]}

    with pytest.raises(RuntimeError, match="no such thing"):
        notebook.execute(notebook_of("!(echo no such thing; false) | tail -n 1"), tmp_path)
    with pytest.raises(ZeroDivisionError):
        notebook.execute(notebook_of("1 / 0"), tmp_path)
    content = notebook_of("print('a')\n2 + 3")
    notebook.execute(content, tmp_path)
    printed, value = content["cells"][0]["outputs"]
    assert printed["text"] == ["a\n"] and value["data"] == {"text/plain": ["5"]}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tour_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(TOUR, tmp_path)
    content = json.loads(TOUR.read_text())
    notebook.execute(content, tmp_path)
    assert (tmp_path / "tour" / "segment" / "summary.json").exists()
    ours = [[o["output_type"] for o in c.get("outputs", [])] for c in content["cells"]]
    assert ours == [[o["output_type"] for o in c.get("outputs", [])] for c in json.loads(TOUR.read_text())["cells"]]
