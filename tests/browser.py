"""A page in a real browser, headless and driven by its own protocol: real mouse and keys, what it says and asks for."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
PATIENCE_S = 120.0  # for an answer of the browser
AXE = Path(__file__).parent / "axe" / "axe.min.js"

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
    "--remote-debugging-pipe",  # commands on descriptor 3, answers on 4
]


class Browser:
    """A browser's process with one page in it. `profile` is an empty folder for the browser's own files."""

    def __init__(self, profile: Path):
        self.profile = profile
        self.console: list[str] = []  # errors, warnings and messages of the page
        self.requests: list[str] = []  # addresses that the page asked for, beside its own and the data in it
        self.unread, self.last_id, self.session = b"", 0, ""

    def __enter__(self) -> "Browser":
        commands, ours = os.pipe()
        self.answers, answers = os.pipe()
        self.commands = os.fdopen(ours, "wb", buffering=0)
        line = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        command = ["bash", "-c", line, str(CHROMIUM), *FLAGS, f"--user-data-dir={self.profile}"]
        self.process = subprocess.Popen(command, pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.commands.close()
        os.close(self.answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command of the DevTools protocol and waits for its result."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        for answer in self.messages():
            if answer.get("id") == self.last_id:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
        raise AssertionError(f"{method}: the browser ended, or was silent for {PATIENCE_S} s")

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the browser says, one message after another; events are noted on the way."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            first, zero, rest = self.unread.partition(b"\0")
            if zero:
                self.unread = rest
                message = json.loads(first)
                self.note(message.get("method"), message.get("params", {}))
                yield message
            elif select.select([self.answers], [], [], 1)[0]:
                content = os.read(self.answers, 1 << 20)
                if not content:
                    return
                self.unread += content

    def note(self, event: str | None, values: dict[str, Any]) -> None:
        """Keeps what the page printed, threw or asked for."""
        if event == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(argument.get("value")) for argument in values["args"]))
        elif event == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Log.entryAdded":
            self.console.append(values["entry"]["text"])
        elif event == "Network.requestWillBeSent" and values["type"] != "Document":
            url = values["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)

    def open(self, url: str | Path, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        """Shows a page in a window of that size, and waits until its script has laid it out."""
        self.console.clear()
        self.requests.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        answer = self.call("Page.navigate", url=url.as_uri() if isinstance(url, Path) else url)
        assert "errorText" not in answer, answer
        self.wait("document.readyState === 'complete' && document.body?.dataset.ready === 'yes'")
        self.settle()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until a JavaScript expression holds."""
        until = time.monotonic() + PATIENCE_S
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < until, f"{condition} did not come true: {self.console}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Waits until the page has been drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element in the window, which is scrolled to it."""
        script = f"""(() => {{ const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center"}}); const b = element.getBoundingClientRect();
            return [b.left, b.top, b.width, b.height]; }})()"""
        left, top, width, height = self.evaluate(script)
        return left, top, width, height

    def mouse(self, kind: str, x: float, y: float, clicks: int = 0) -> None:
        """Moves, presses or releases the mouse (`mouseMoved`, `mousePressed`, `mouseReleased`) at a point."""
        held = 1 if kind == "mousePressed" or (kind == "mouseMoved" and clicks) else 0
        button = "left" if clicks else "none"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=held, clickCount=clicks)
        self.settle()

    def hover(self, selector: str, across: float = 0.5) -> None:
        """Moves the mouse over an element, at a share of its width."""
        left, top, width, height = self.box(selector)
        self.mouse("mouseMoved", left + across * width, top + height / 2)

    def click(self, selector: str, times: int = 1) -> None:
        """Clicks in the middle of an element; twice is a double click."""
        left, top, width, height = self.box(selector)
        for count in range(1, times + 1):
            self.mouse("mousePressed", left + width / 2, top + height / 2, count)
            self.mouse("mouseReleased", left + width / 2, top + height / 2, count)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Drags over an element, from a share of its width to another."""
        left, top, width, height = self.box(selector)
        y = top + height / 2
        self.mouse("mouseMoved", left + start * width, y)
        self.mouse("mousePressed", left + start * width, y, 1)
        for share in ((start + end) / 2, end):
            self.mouse("mouseMoved", left + share * width, y, 1)
        self.mouse("mouseReleased", left + end * width, y, 1)

    def key(self, name: str) -> None:
        """Presses a key, such as `ArrowRight` or `Enter`."""
        text = {"Enter": "\r"}.get(name, "")
        code = {"Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}[name]
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **typed)
        self.settle()

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Writes what the window shows, or the `whole` page."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        if whole:
            height = self.evaluate("document.documentElement.scrollHeight")
            width = self.evaluate("innerWidth")
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(picture["data"]))

    def violations(self) -> list[str]:
        """What axe-core says of the page that is serious or critical: rule, element and reason."""
        self.call("Runtime.evaluate", expression=AXE.read_text())
        result = self.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{rule['impact']} {rule['id']}: {node['html'][:120]} ({node['failureSummary']})"
            for rule in result["violations"]
            for node in rule["nodes"]
            if rule["impact"] in ("serious", "critical")
        ]
