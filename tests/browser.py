"""A page in headless Chromium, driven through its debugging pipe; nothing but Chromium is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str | None:
    """The program, or None where there is none: ``SDFIT_CHROMIUM``, or one of `NAMES` on the path."""
    return os.environ.get("SDFIT_CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions")


def unusable() -> str:
    """Why no page can be opened; empty if one can."""
    program = chromium()
    if program is None:
        return "no chromium is installed (make chromium; or set SDFIT_CHROMIUM)"
    with tempfile.TemporaryDirectory(prefix="sdfit-browser-", ignore_cleanup_errors=True) as home:
        try:
            ran = subprocess.run(
                [program, *FLAGS, f"--user-data-dir={home}", "--dump-dom", "about:blank"],
                check=False, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{program} does not start: {error}"
    return "" if ran.returncode == 0 else f"{program} does not start: {ran.stderr.strip()[-200:]}"


LAUNCH = """
import fcntl, os, sys
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, wanted in zip(high, (3, 4)):
    os.dup2(number, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads its commands from descriptor 3 and answers on 4, whatever numbers the pipes have here."""


KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Space": 32}
"""What fields of a form listen to; Chromium does not conclude it from the name."""


class Page:
    """A page that is open, with all that its console said.

    Parameters
    ----------
    file : Path
        What to open.
    address : str
        What follows the file's name, such as ``#height=512``.
    size : (int, int)
        Width and height of the window [CSS pixels].
    scheme : {'light', 'dark'}
    """

    def __init__(
        self, file: Path, address: str = "", size: tuple[int, int] = (1400, 1000), scheme: str = "light"
    ) -> None:
        self.file, self.address, self.size, self.scheme = file, address, size, scheme
        self.console: list[str] = []
        self.requests: list[str] = []
        self._last = 0
        self._rest = b""

    def __enter__(self) -> Page:
        self._home = tempfile.TemporaryDirectory(prefix="sdfit-browser-", ignore_cleanup_errors=True)
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [
            sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), str(chromium()),
            *FLAGS, "--disable-background-networking", f"--user-data-dir={self._home.name}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session: str | None = None
        target = next(t for t in self._send("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self._send(f"{domain}.enable")
        width, height = self.size
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if width < 600 else 1, mobile=width < 600,
        )  # fmt: skip
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": self.scheme}])
        self._send("Page.navigate", url=self.file.resolve().as_uri() + self.address)
        self.wait("document.readyState === 'complete'")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)
        self._home.cleanup()

    def __call__(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        got = self._send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in got:
            raise AssertionError(got["exceptionDetails"].get("exception", {}).get("description", got))
        return got["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def type(self, name: str, value: object) -> None:
        """Fill a field of the form as a person does: the page hears of it."""
        self(
            f"(() => {{ const field = document.querySelector('[name={name}]'); const value = {json.dumps(value)};"
            "if (field.type === 'checkbox') field.checked = value; else field.value = value;"
            "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def press(self, key: str) -> None:
        """Press a key."""
        text: dict[str, Any] = {"text": "\r"} if key == "Enter" else {"text": " "} if key == "Space" else {}
        if key in KEY_CODES:
            text["windowsVirtualKeyCode"] = KEY_CODES[key]
        name = " " if key == "Space" else key
        self._send("Input.dispatchKeyEvent", type="keyDown", key=name, code=key, **text)
        self._send("Input.dispatchKeyEvent", type="keyUp", key=name, code=key)

    def _middle(self, selector: str) -> tuple[float, float, float]:
        """The middle of an element, scrolled into view, and half its width [CSS pixels]."""
        self(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        left, top, width, height = self(
            f"(box => [box.left, box.top, box.width, box.height])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        return left + width / 2, top + height / 2, width / 2

    def drop(self, file: Path, selector: str) -> None:
        """Drag a file over an element and let it go there."""
        x, y, _ = self._middle(selector)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for event in ("dragEnter", "dragOver", "drop"):
            self._send("Input.dispatchDragEvent", type=event, x=x, y=y, data=data)

    def slide(self, selector: str) -> None:
        """Drag a slider from its middle to its end with the mouse."""
        x, y, half = self._middle(selector)
        held = {"button": "left", "buttons": 1, "clickCount": 1}
        self._send("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **held)
        for step in (0.5, 1):
            self._send("Input.dispatchMouseEvent", type="mouseMoved", x=x + half * step, y=y, **held)
        self._send("Input.dispatchMouseEvent", type="mouseReleased", x=x + half, y=y, **held)

    def shoot(self, path: Path, whole: bool = False) -> None:
        """Write a picture of the window, or of the whole page, as PNG."""
        clip: dict[str, Any] = {}
        if whole:
            height = min(self("document.documentElement.scrollHeight"), 16000)
            clip = {
                "captureBeyondViewport": True,
                "clip": {"x": 0, "y": 0, "width": self.size[0], "height": height, "scale": 1},
            }
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", **clip)["data"]))

    def _send(self, method: str, **parameters: Any) -> Any:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            got = self._receive()
            if got.get("id") == self._last:
                assert "error" not in got, got["error"]
                return got["result"]

    def _receive(self) -> Any:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], 120)
            assert ready, "the browser says nothing"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser ended"
            self._rest += part
        first, self._rest = self._rest.split(b"\0", 1)
        got = json.loads(first)
        kind, said = got.get("method"), got.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.console.append(str(said["exceptionDetails"].get("exception", {}).get("description", said)))
        elif kind == "Log.entryAdded":
            self.console.append(f"{said['entry']['level']}: {said['entry']['text']}")
        elif kind == "Runtime.consoleAPICalled":
            self.console.append(f"{said['type']}: {said['args']}")
        elif kind == "Network.requestWillBeSent" and not said["request"]["url"].startswith("data:"):
            self.requests.append(said["request"]["url"])
        return got
