"""Chromium through its debugging pipe (https://chromedevtools.github.io/devtools-protocol), with nothing installed."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE = 120.0  # seconds for an answer
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which does not work as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--mute-audio",
)
_KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def executable() -> str | None:
    """Return where Chromium is; None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


def evaluate(page: str, code: str, width: int, folder: Path) -> Any:
    """Return what a function ``(document, window) => value`` gives for a page in a window of so many CSS pixels.

    Skips the test where there is no Chromium.
    """
    program, file = executable(), folder / "page.html"
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    file.write_text(page, encoding="utf-8")
    with opened(program, folder / "profile") as tab:
        tab.resize(width, 900)
        tab.open(file.as_uri())
        return tab.evaluate(f"({code})(document, window)")


@dataclass
class Page:
    """A tab. complaints: what the console and exceptions said."""

    to: int
    come: int
    session: str = ""
    complaints: list[str] = field(default_factory=list)
    _number: int = 0
    _rest: bytes = b""
    _messages: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        """Return the next message; keep those that complain."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self.come], [], [], _PATIENCE)
            assert ready, "Chromium does not answer"
            more = os.read(self.come, 1 << 20)
            assert more, "Chromium has ended"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(message["params"]))
        return message

    def open(self, address: str) -> None:
        """Open an address, and wait until its script has run."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, code: str) -> Any:
        """Return the value of an expression, of a promise's result."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press a key and let it go, as a person does."""
        code = _KEYS.get(key) or ord(key.upper())
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        common = {"key": key, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Make the window so many CSS pixels wide, as a phone or a screen, light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def opened(program: str, profile: Path) -> Iterator[Page]:
    """Start Chromium with a profile of its own, and yield a tab; it is ended afterwards."""
    (read_command, write_command), (read_answer, write_answer) = os.pipe(), os.pipe()
    # the numbers 3 and 4 are what Chromium reads and writes: its ends must not be these already
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read_command, write_answer)]
    os.close(read_command)
    os.close(write_answer)
    actions = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
    with (profile.parent / f"{profile.name}.log").open("w") as log:
        actions += [(os.POSIX_SPAWN_DUP2, log.fileno(), 2)]
        arguments = [program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = os.posix_spawn(program, arguments, os.environ, file_actions=actions, setpgroup=0)
    for end in ends:
        os.close(end)
    try:
        page = Page(write_command, read_answer)
        targets = page.call("Target.getTargets")["targetInfos"]
        (tab,) = [target["targetId"] for target in targets if target["type"] == "page"]
        page.session = page.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(write_command)
        os.close(read_answer)
