"""Pages in a real browser: Chromium without a window, where the machine has it."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_HOST = """<!doctype html><body style="margin:0"><iframe style="border:0" width="{width}" height="900" srcdoc="{page}">
</iframe><pre id="result"></pre><script>
document.querySelector("iframe").addEventListener("load", (event) => {{
  const view = event.target.contentWindow, page = view.document;
  let result;
  try {{ result = {{value: ({code})(page, view)}}; }} catch (error) {{ result = {{error: String(error)}}; }}
  document.querySelector("#result").textContent = JSON.stringify(result);
}});
</script></body>"""


def chromium() -> str:
    """Return Chromium's path, or skip the test that asks for it."""
    paths = [path for path in map(shutil.which, _NAMES) if path]
    if not paths:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return paths[0]


def evaluate(page: str, code: str, width: int, folder: Path) -> Any:
    """Return what a function ``(document, window) => value`` gives for a page in a window of so many CSS pixels.

    A frame of that width shows the page: windows of Chromium itself have at least 500 pixels.
    """
    browser, host = chromium(), folder / "host.html"
    host.write_text(_HOST.format(width=width, page=html.escape(page), code=code), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"]
    options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([browser, *options, host.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    shown = done.stdout.rpartition('<pre id="result">')[2].partition("</pre>")[0]
    assert shown, f"{browser} ran no script: {done.stderr[-2000:]}"
    result = json.loads(html.unescape(shown))
    assert "error" not in result, result
    return result["value"]
