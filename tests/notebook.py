"""Executes a notebook as Jupyter would, without Jupyter: `python tests/notebook.py docs/tour.ipynb` writes outputs.

A cell that starts with `!` is a shell command, any other is Python. A cell shows what it prints, and the value of its
last expression: a picture where that has one (`_repr_png_`), else its text. A cell that fails ends the execution.
"""

import ast
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

Cell = dict[str, Any]  # as nbformat 4 writes it


def execute(notebook: dict[str, Any], folder: Path) -> None:
    """Runs the code cells in `folder`, in order and in one namespace, and gives each its outputs."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number, cell in enumerate(code, start=1):
            source = "".join(cell["source"])
            outputs = command_outputs(source) if source.startswith("!") else python_outputs(source, namespace, number)
            cell |= {"execution_count": number, "outputs": outputs}
    finally:
        os.chdir(before)


def command_outputs(source: str) -> list[Cell]:
    """What a shell command prints. Raises RuntimeError where it fails, a part of a pipe included."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-o", "pipefail", "-c", source[1:]]
    result = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{source}\n{result.stdout}")
    return [stream(result.stdout)] if result.stdout else []


def python_outputs(source: str, namespace: dict[str, Any], number: int) -> list[Cell]:
    """What Python code prints, and the value of its last expression."""
    tree, printed, value = ast.parse(source), io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
    outputs = [stream(printed.getvalue())] if printed.getvalue() else []
    if value is not None:
        shown: Cell = {"text/plain": lines(repr(value))}
        if (picture := getattr(value, "_repr_png_", None)) is not None:
            shown = {"image/png": base64.b64encode(picture()).decode(), "text/plain": ["a picture"]}
        outputs.append({"data": shown, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def stream(text: str) -> Cell:
    return {"name": "stdout", "output_type": "stream", "text": lines(text)}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    content = json.loads(path.read_text())
    execute(content, path.parent)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
