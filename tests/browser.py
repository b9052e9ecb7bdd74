"""A page in a real browser, headless: what its document becomes, what its console says, and what it asks for."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

INSIDE = "not an origin"  # who asks for what the browser wants for itself
# Quiet in itself: without these the browser looks for updates of its own
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--no-first-run",
    "--no-pings",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--hide-scrollbars",
    "--virtual-time-budget=4000",
    "--enable-logging=stderr",
]


@dataclass
class Seen:
    """What a browser made of a page."""

    document: str
    console: list[str]
    requests: list[str]

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.document))


def look(page: Path, place: Path, script: str = "") -> Seen:
    """Opens a page, and runs a script in it as a user's hand would; its result lies in the document."""
    copy = place / f"shown_{page.stem}.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    log = place / "network.json"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={place / 'profile'}", f"--log-net-log={log}", "--dump-dom"]
    told = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    console = [line for line in told.stderr.splitlines() if "CONSOLE" in line]
    return Seen(told.stdout, console, requests(log, copy))


def requests(log: Path, page: Path) -> list[str]:
    """Addresses that were asked for, other than the page itself and data that stands in it."""
    text = log.read_text()
    try:
        events = json.loads(text)["events"]
    except json.JSONDecodeError:  # the last line is missing where the browser was quick to leave
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    told = [event.get("params") or {} for event in events]
    asked = {str(one["url"]) for one in told if one.get("initiator", INSIDE) != INSIDE and "url" in one}
    return sorted(url for url in asked if not url.startswith("data:") and url != page.as_uri())
