"""Words of any script in figures: drawn with a font that has them or escaped, and never a warning."""

import json
import re
import warnings

import numpy as np
import pytest
from conftest import TINY, run_here
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from PIL import Image

from mae.report import glyphs, sweep_figure
from mae.report.glyphs import drawable
from mae.report.sweep_figure import Curve
from mae.tasks import charts

NAMES = ["犬", "猫 cat", "कुत्ता", "🐶", "$5 note$", "a\tb", "x\udcff", "Hündchen"]


def path_of(family: str) -> str:
    return findfont(FontProperties(family=[family]))


def letters(family: str) -> set[str]:
    return set(map(chr, FT2Font(path_of(family)).get_charmap()))


@pytest.fixture
def only(monkeypatch):
    """A machine with these font families alone."""

    def families(*names: str) -> None:
        monkeypatch.setattr(glyphs, "_families", lambda: {name: path_of(name) for name in names})

    return families


def test_class_names_of_any_script_are_drawn_without_a_warning(tmp_path, recwarn):
    counts = np.eye(len(NAMES), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts.confusion(counts, NAMES, tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").size[0] > 300


def test_what_no_font_has_is_escaped_and_stays_apart(only):
    only()
    words, properties = drawable(NAMES)
    assert words == [
        r"\u72ac", r"\u732b cat", "".join(ascii(c)[1:-1] for c in NAMES[2]), r"\U0001f436", "$5 note$", r"a\tb",
        r"x\udcff", "Hündchen",
    ]  # fmt: skip
    assert properties == {"parse_math": False}
    assert len(set(words)) == len(NAMES)


def test_a_font_of_the_machine_that_has_the_letters_is_used(only, tmp_path):
    letter = min(letters("STIXGeneral") - letters("DejaVu Sans"), key=ord)
    only("cmr10", "STIXGeneral")
    words, properties = drawable([f"a{letter}"])
    assert words == [f"a{letter}"] and properties["fontfamily"][-1] == "STIXGeneral"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts.confusion(np.eye(2, dtype=np.int64), [f"a{letter}", "b"], tmp_path / "a.png")


def test_a_sweep_over_words_of_any_script_is_drawn_without_a_warning(tmp_path):
    class Group(dict):
        __getattr__ = dict.__getitem__

    cfg = Group(model=Group(name="vit_nano"), data=Group(name="图片$x"))
    curves = [Curve("top1", "finetune", "data.root", f"seed {name} $", {n: [1.0] for n in NAMES}) for name in NAMES[:2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sweep_figure.draw_figure(curves, cfg, tmp_path / "a.png", tmp_path / "a.svg")  # type: ignore[arg-type]
    assert (tmp_path / "a.svg").read_text()


def test_a_classifier_of_chinese_classes_says_nothing_of_glyphs(tmp_path, capfd):
    for name in ("犬", "猫"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(8):
            pixels = np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{k}.png")
    command = [*TINY, "task=finetune", "data=folder", f"data.root={tmp_path / 'data'}", "data.fraction=1"]
    assert run_here(tmp_path / "run", *command, "task.batch_size=8", "task.max_steps=1", "data.img_size=16") == 0
    assert not re.search("glyph|font", capfd.readouterr().err, re.I)
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["犬", "猫"]
