"""Text of any script in matplotlib's figures.

It is drawn with a font of this machine that has its letters, or escaped where no font has them.
"""

import functools
import unicodedata
from collections.abc import Sequence
from typing import Any

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

PLACEHOLDERS = ("Last Resort", "Emoji")  # fonts with boxes for all letters, and of pictures that are not drawn


def drawable(texts: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The texts as they can be drawn, and the properties of matplotlib's text that draws them."""
    families, standard = [], font_manager.findfont(FontProperties())
    missing = {letter for text in texts for letter in text if _visible(letter)} - _letters(standard)
    for family, path in _families().items() if missing else ():
        if known := missing & _letters(path):
            families.append(family)
            missing -= known
    properties: dict[str, Any] = {"parse_math": False}  # a dollar sign begins no formula
    if families:
        properties["fontfamily"] = [*FontProperties().get_family(), *families]
    return ["".join(_escaped(letter, missing) for letter in text) for text in texts], properties


def make_drawable(text: Text) -> None:
    """Changes text in a figure to what can be drawn."""
    (letters,), properties = drawable([text.get_text()])
    text.set_text(letters)
    text.update(properties)


def _visible(letter: str) -> bool:
    """Whether fonts can have a character: it is no control character, nor a byte that is no text."""
    return unicodedata.category(letter) not in ("Cc", "Cs")


def _escaped(letter: str, missing: set[str]) -> str:
    return ascii(letter)[1:-1] if letter in missing or not _visible(letter) else letter


@functools.cache
def _families() -> dict[str, str]:
    """Upright font families of this machine in their normal weight -> their files."""
    fonts = sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name, font.fname))
    normal = [font for font in fonts if font.style == "normal" and font.weight in (400, "normal", "regular")]
    return {font.name: font.fname for font in normal if not any(word in font.name for word in PLACEHOLDERS)}


@functools.cache
def _letters(path: str) -> frozenset[str]:
    """The characters that a font's file has."""
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):  # a font of a kind that matplotlib does not read
        return frozenset()
