"""README and the pages of docs/, and the commands in them."""

import re

from architecture import ROOT

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
CONVERTING, PUBLISHING, VERIFICATION = (PAGES[f"{name}.md"] for name in ("converting", "publishing", "verification"))


def lines_of(text: str) -> list[str]:
    """The lines of a page's shell blocks, and those of its console sessions that are typed."""
    lines = []
    for kind, block in re.findall(r"^```(sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        typed = block.splitlines() if kind == "sh" else re.findall(r"^\$ (.*)$", block, re.MULTILINE)
        lines += [line for line in typed if line]
    return lines


def commands_of(text: str) -> list[str]:
    """The commands of a page that begin with a program of this toolkit."""
    return [line for line in lines_of(text) if line.startswith("ppx-")]
