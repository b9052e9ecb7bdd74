"""An HTML file that holds its data, scripts and pictures: it opens anywhere and needs no network."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

WEB = Path(__file__).parent / "web"
UPLOT = WEB / "uplot"  # the charts' library, 1.6.32 of npm, as it was published
SCRIPTS = ("elements.js", "curves.js", "sweep.js", "runs.js", "page.js")
LARGE = 120_000  # bytes of a PNG above which a lossy picture is tried
# Browsers then load nothing from outside of the page
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
LIVE = "; connect-src 'self'"


def page(title: str, data: Mapping[str, object], live: bool = False) -> str:
    """The page of `data`: `runs`, and `differences` or `sweep`, as `web/page.js` reads them.

    A `live` page is served, and asks its server for new data.
    """
    text = json.dumps(finite({"title": title, "live": live, **data}), allow_nan=False).replace("<", "\\u003c")
    library = f"/*! uPlot\n{(UPLOT / 'LICENSE').read_text()}*/\n{(UPLOT / 'uPlot.iife.min.js').read_text()}"
    scripts = "\n".join((WEB / name).read_text().replace('"use strict";\n', "") for name in SCRIPTS)
    styles = f"{(UPLOT / 'uPlot.min.css').read_text()}\n{(WEB / 'style.css').read_text()}"
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}{LIVE if live else ""}">\n'
        "<meta name='viewport' content='width=device-width'>\n<link rel='icon' href='data:,'>\n"
        f"<title>{html.escape(title)}</title>\n<style>\n{styles}</style>\n</head>\n"
        f"<body>\n<main></main>\n<script type='application/json' id='data'>{text}</script>\n"
        f"<script>\n{library}</script>\n"
        f'<script>\n"use strict";\n{scripts}</script>\n</body>\n</html>\n'
    )


def finite(value: object) -> object:
    """The value with None for each number that is not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_url(path: Path) -> str:
    """A picture as a URL that holds it; large photographs are made smaller."""
    content, kind = path.read_bytes(), path.suffix.lstrip(".").replace("svg", "svg+xml")
    if kind == "png" and len(content) > LARGE:
        packed = io.BytesIO()
        with Image.open(io.BytesIO(content)) as picture:
            picture.convert("RGB").save(packed, "WEBP", quality=80)
        if packed.tell() < len(content):
            content, kind = packed.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
