"""A hook of MkDocs: writes the reference of all keys and tasks from conf/ and the code, and the first page.

Every key of a group has its type and range from the signature that it is checked against, and its default and comment
from the YAML.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from mae.config import schema
from mae.config.compose import CONF
from mae.config.values import describe
from mae.tasks.registry import TASKS

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^(?P<key>\w+):(?P<value>(?:[^#'\"]|'[^']*'|\"[^\"]*\"|(?<!\s)#)*)(?:#\s*(?P<comment>.*))?$")
REPOSITORY_FILES = ("CHANGELOG.md", "CONTRIBUTING.md")


@dataclass
class Key:
    """A line of a group's YAML."""

    default: str
    comment: str


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {"reference/config.md": config_page(), "reference/tasks.md": tasks_page(), "index.md": first_page()}
    pages["tour.md"] = notebook_page(ROOT / "docs" / "tour.ipynb")
    pages |= {name.lower(): (ROOT / name).read_text().replace("](docs/", "](") for name in REPOSITORY_FILES}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def notebook_page(path: Path) -> str:
    """A notebook's text, code, and outputs."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            shown = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in shown:
                parts.append(f'<img alt="output" src="data:image/png;base64,{shown["image/png"]}">')
            else:
                parts.append(f"```text\n{''.join(shown['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def first_page() -> str:
    """The README, whose links lead to docs/ and to files beside it."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](").replace('src="docs/', 'src="')
    text = text.replace("](tour.ipynb", "](tour.md")
    return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](CHANGELOG.md", "](changelog.md")


def config_page() -> str:
    """Every group, its options, and the keys of each."""
    parts = ["# Every key\n", "Generated from `conf/` and the signatures that a config is checked against.\n"]
    parts += ["## Keys of no group\n", *table_of(keys_of(CONF / "config.yaml"), schema.signature(schema.TOP))]
    for group in schema.SCHEMA:
        shown: dict[str, str] = {}  # key -> the row that an earlier option of the group has
        folder = CONF / group
        options = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
        comments = comments_of(options, group)
        parts.append(f"\n## {group}\n")
        if not options:
            section = section_of(CONF / "config.yaml", group)
            parts += table_of(section, schema.schema(group, None))
        for path in options:
            keys = keys_of(path, group)
            name = keys["name"].default if "name" in keys else path.stem
            try:
                types = schema.schema(group, name)
            except KeyError:  # a file that another one includes
                continue
            for key, entry in keys.items():
                entry.comment = entry.comment or comments.get(key, "")
            rows = list(table_of(keys, types))
            new = [row for row in rows[2:] if shown.get(row.split("|")[1]) != row]
            shown |= {row.split("|")[1]: row for row in new}
            parts += [f"\n### {group}={path.stem}\n", *([*rows[:2], *new] if new else ["The same keys as above."])]
    return "\n".join(parts) + "\n"


def comments_of(options: list[Path], group: str) -> dict[str, str]:
    """Of each key the first comment that an option of its group has."""
    comments: dict[str, str] = {}
    for path in options:
        for key, entry in keys_of(path, group).items():
            if entry.comment:
                comments.setdefault(key, entry.comment)
    return comments


def table_of(keys: dict[str, Key], types: dict[str, Any]) -> Iterator[str]:
    """The lines of a table, a row for each key that has a type."""
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    for name, hint in types.items():
        if name != "name" and name in keys:
            key = keys[name]
            yield f"| `{name}` | {cell(type_text(hint))} | `{cell(key.default) or 'null'}` | {cell(key.comment)} |"


def cell(text: str) -> str:
    """A text that may stand in a cell of a table."""
    return text.replace("|", "\\|").strip()


def type_text(hint: Any) -> str:
    """A type in words, with the range of each number."""
    ranges = list(ranges_of(hint))
    return describe(hint) + (f" in {' or '.join(dict.fromkeys(ranges))}" if ranges else "")


def ranges_of(hint: Any) -> Iterator[str]:
    """The intervals that a type names."""
    if get_origin(hint) is Annotated:
        yield from (str(extra) for extra in get_args(hint)[1:])
    for part in get_args(hint):
        if get_origin(part) is not None:
            yield from ranges_of(part)


def keys_of(path: Path, group: str = "") -> dict[str, Key]:
    """The keys of a YAML file, those of the files that it includes first; of a global file those of its group."""
    text = path.read_text()
    included: dict[str, Key] = {}
    for entry in yaml.safe_load(text).get("defaults", []) if group else []:
        if isinstance(entry, str) and "@" in entry:
            included |= keys_of(path.parent / f"{entry.partition('@')[0]}.yaml", group)
        elif isinstance(entry, str) and entry != "_self_":
            included |= keys_of(path.parent / f"{entry}.yaml", group)
    return included | (section_of(path, group) if "@package _global_" in text else lines_of(text.splitlines()))


def section_of(path: Path, group: str) -> dict[str, Key]:
    """The keys of a group that stands in config.yaml itself."""
    match = re.search(rf"^{group}:.*\n((?:  .*\n|\n)+)", path.read_text(), re.M)
    return lines_of([line[2:] for line in match[1].splitlines()]) if match else {}


def lines_of(lines: list[str]) -> dict[str, Key]:
    """The keys of the lines `key: value  # comment`; a comment may go on in lines of its own."""
    keys: dict[str, Key] = {}
    last = None
    for line in lines:
        if match := LINE.match(line):
            last = Key(match["value"].strip(), (match["comment"] or "").strip())
            keys[match["key"]] = last
        elif last is not None and re.match(r"^\s+#\s", line):
            last.comment += " " + line.strip().lstrip("# ")
        else:
            last = None
    return keys


def tasks_page() -> str:
    """The table of tasks."""
    lines = ["# Tasks\n", "Generated from `mae/tasks/registry.py`.\n"]
    lines += ["| `task=` | what it does | trains | needs |", "|---|---|---|---|"]
    for name, entry in TASKS.items():
        needs = [word for word, needed in (("`init=`", entry.needs_init), ("labels", entry.needs_labels)) if needed]
        metric = f" Main result: `{entry.metric.key}` ({entry.metric.title})." if entry.metric else ""
        lines.append(f"| `{name}` | {entry.about}{metric} | {'yes' if entry.trains else 'no'} | {', '.join(needs)} |")
    return "\n".join(lines) + "\n"
