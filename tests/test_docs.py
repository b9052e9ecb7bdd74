"""README and docs/: their sentences are short, links lead somewhere, and the site builds without a warning."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_SENTENCE, MEAN_SENTENCE = 30, 18


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


def test_every_key_of_the_reference_has_a_type_and_a_comment(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| `.*` \| (.*) \|$", importlib.import_module("hooks").config_page(), re.M)
    assert len(rows) > 300
    assert not [key for key, kind, comment in rows if not kind.strip() or not comment.strip()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="mkdocs is not installed: pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "config" / "index.html").read_text()
    assert "<code>layer_decay</code>" in reference and "<code>mask_ratio</code>" in reference
