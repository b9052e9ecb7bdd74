"""README and docs/: their commands compose, their sentences are short, and the site builds without a warning."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, composed

from mae.cli import SUBCOMMANDS
from mae.config import from_run
from mae.config.overrides import key_of
from mae.launch.slurm.status import VERBS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_SENTENCE, MEAN_SENTENCE = 30, 18
COMMAND = re.compile(r"^(?:python run\.py|mae)(?: (?P<words>.*))?$")


def commands(page: Path) -> Iterator[str]:
    """The words after `python run.py` or `mae`, of fenced lines and of code in the text."""
    text = page.read_text()
    fenced = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in [*fenced, *inline]:
        if match := COMMAND.match(re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))):
            yield match["words"] or ""


def complete(words: str) -> bool:
    """Whether a command is a run that composes by itself, and no subcommand, option or pattern."""
    first = words.split(" ")[0]
    other = first in SUBCOMMANDS or key_of(first) in (*VERBS, "resume", "replay") or first.startswith("--")
    pattern = re.search(r"\.\.\.|=NAME\b|KEY=VALUE| -sc |task\.mask_ration", f" {words} ")
    return not other and pattern is None


def first_member(override: str) -> str:
    """The first of the values that a sweep lists."""
    key, _, value = override.partition("=")
    return override if value[:1] in "[({'\"" or "(" in value else f"{key}={value.split(',')[0]}"


CASES = list(dict.fromkeys((page, words) for page in PAGES for words in commands(page) if complete(words)))


def test_the_documents_hold_commands():
    assert len(CASES) > 40


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words"), CASES, ids=[f"{page.name}: {words[:60]}" for page, words in CASES])
def test_each_command_composes_to_a_config_that_passes_the_check(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in re.findall(r"data\.root=(\w+)(?!\S)", words):  # the check wants the directory to be there
        (tmp_path / root).mkdir()
    overrides = [word for word in shlex.split(words) if word not in ("-m", "--multirun")]
    chosen = [first_member(word) for word in from_run.with_groups(overrides)]
    cfg = composed(*(word for word in chosen if key_of(word) != from_run.MARK))
    assert cfg.task.name


def sentences(page: Path) -> list[str]:
    """The sentences of a page's prose, without code, tables and headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    lines = [line for line in text.splitlines() if not re.match(r"\s*([|#<!]|---)", line)]
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", "\n".join(lines))
    return [
        " ".join(sentence.split())
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?:;])\**\s+", paragraph.strip())
        if sentence.strip()
    ]


def words_of(sentence: str) -> int:
    return len(re.findall(r"[A-Za-z][\w'-]*", sentence))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page):
    lengths = {sentence: words_of(sentence) for sentence in sentences(page)}
    assert not [sentence for sentence, length in lengths.items() if length > LONGEST_SENTENCE]
    assert sum(lengths.values()) <= MEAN_SENTENCE * len(lengths)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    names = ("contributing", "changelog", "index", "tour", "reference/config", "reference/tasks")
    pages = {f"{name}.md" for name in names}  # generated
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text()):
        link = target[0] or target[1]
        path = (page.parent / link).resolve()
        generated = path.is_relative_to(ROOT / "docs") and str(path.relative_to(ROOT / "docs")) in pages
        assert link.startswith("https://") or generated or path.exists(), link


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="mkdocs is not installed: pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "config" / "index.html").read_text()
    assert "<code>layer_decay</code>" in reference and "<code>mask_ratio</code>" in reference
