"""Counts that say how the code of `mae/` keeps house; `python tests/house.py` prints them.

Lines, entries of `mae/`, `Any` per 1,000 lines, top-level names of several modules, names that say nothing of what they
hold, long functions and files, long sentences in docstrings and comments.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
VAGUE = {"found", "told", "made", "given", "one", "where", "part", "place", "kept"}
COINED = {"foreign", "fit", "lean", "chance", "fence", "fitting", "forecast", "inherit"}
COINED |= {"begin", "take_up_init", "improved", "conclude"}  # and `signal`, `draw`: hooks of a task
LONGEST_SENTENCE = 30  # words


def modules(root: Path = ROOT) -> list[Path]:
    return sorted((root / "mae").rglob("*.py"))


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a module binds, with its line: variables, parameters, functions, classes, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield (node.id if isinstance(node, ast.Name) else node.attr), node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def forbidden_names(root: Path = ROOT) -> list[str]:
    """`file:line name` of each name that the glossary of CONTRIBUTING.md rules out."""
    return [
        f"{path.relative_to(root)}:{line} {name}"
        for path in modules(root)
        for name, line in bound_names(ast.parse(path.read_text()))
        if name in VAGUE | COINED
    ]


def top_level_names(root: Path = ROOT) -> dict[str, set[str]]:
    """Top-level function, class or constant -> the modules that define it."""
    definitions: dict[str, set[str]] = defaultdict(set)
    for path in modules(root):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                continue
            for name in names:
                definitions[name].add(str(path.relative_to(root)))
    return definitions


def shared_names(root: Path = ROOT, most: int = 2) -> list[str]:
    """Top-level names of more than `most` modules; `log` and `main` mean the same everywhere."""
    return [
        f"{name}: {', '.join(sorted(paths))}"
        for name, paths in sorted(top_level_names(root).items())
        if len(paths) > most and name not in ("log", "main")
    ]


def long_functions(root: Path = ROOT, most: int = 60) -> list[str]:
    return [
        f"{path.relative_to(root)}:{node.name} {node.end_lineno - node.lineno + 1}"
        for path in modules(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= most
    ]


def long_files(root: Path = ROOT, most: int = 250) -> list[str]:
    lengths = {path: path.read_text().count("\n") for path in modules(root)}
    return [f"{path.relative_to(root)} {length}" for path, length in lengths.items() if length > most]


def prose(path: Path) -> Iterator[str]:
    """Docstrings and blocks of comments of a file."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield from re.split(r"\n\s*\n", text)
    block, last = "", -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment = token.string.lstrip("# ")
            joined = token.start[0] == last + 1 and not token.line[: token.start[1]].strip()
            if not joined and block:
                yield block
            block, last = (f"{block} {comment}" if joined else comment), token.start[0]
    if block:
        yield block


def long_sentences(root: Path = ROOT, most: int = LONGEST_SENTENCE) -> list[str]:
    """Sentences of docstrings and comments with more than `most` words."""
    sentences = (
        (path, sentence)
        for path in modules(root)
        for text in prose(path)
        for sentence in re.split(r"(?<=[.!?:;])\s+", re.sub(r"`[^`]*`", "code", text))
    )
    return [
        f"{path.relative_to(root)}: {' '.join(sentence.split())}"
        for path, sentence in sentences
        if len(re.findall(r"[A-Za-z][\w'-]*", sentence)) > most
    ]


def anys(root: Path = ROOT) -> int:
    """How often `Any` stands as a type."""
    return sum(
        isinstance(node, ast.Name) and node.id == "Any"
        for path in modules(root)
        for node in ast.walk(ast.parse(path.read_text()))
    )


def report(root: Path) -> str:
    lines = sum(path.read_text().count("\n") for path in modules(root))
    words = Counter(name.rsplit(" ", 1)[1] for name in forbidden_names(root))
    common = ", ".join(f"{word} {number}" for word, number in words.most_common(6))
    entries = [path for path in (root / "mae").iterdir() if path.name not in ("__pycache__", "__init__.py")]
    rows = [
        ("lines", str(lines)),
        ("entries of mae/", str(len(entries))),
        ("Any per 1,000 lines", f"{1000 * anys(root) / lines:.1f} ({anys(root)})"),
        ("top-level names of over two modules", str(len(shared_names(root)))),
        ("names of the glossary's left column", f"{sum(words.values())} ({common})"),
        ("functions over 60 lines", ", ".join(long_functions(root)) or "none"),
        ("files over 250 lines", ", ".join(long_files(root)) or "none"),
        ("sentences over 30 words", str(len(long_sentences(root)))),
    ]  # fmt: skip
    return "\n".join(f"{title:38} {value}" for title, value in rows)


if __name__ == "__main__":
    sys.stdout.write(report(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT) + "\n")
