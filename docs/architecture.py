"""Draws ``docs/architecture.svg``: the packages with their modules, and which package imports which.

    python docs/architecture.py

Reads the imports of today's code; the same code gives the same bytes. A test fails where the picture is out of date.
"""

import ast
import textwrap
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = ("quant", "convert", "model", "speak", "calibrate", "verify", "recipes")  # each may import those before it
PICTURE = ROOT / "docs" / "architecture.svg"

Name = tuple[str, ...]  # of a module, part by part: ("convert", "bundle", "plan")

_WIDTH, _LEFT, _BOX = 1080, 20, 720  # pixels: of the picture, left of the boxes, of a box
_LINE, _GAP, _PADDING = 19, 26, 12  # pixels: of a line of text, between boxes, within a box
_COLUMNS = 88  # characters of a line of modules
_STYLE = (
    "text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px;fill:#1f2328}"
    ".name{font-size:16px;font-weight:bold}.what{fill:#57606a}"
    "rect{fill:#f6f8fa;stroke:#57606a}path{fill:none;stroke:#0969da;stroke-width:1.5}"
)


def modules() -> list[Path]:
    """Return every module of the packages."""
    return sorted(path for folder in ORDER for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> Name:
    """Return a module's name in the package ``ppx``."""
    return path.relative_to(ROOT).with_suffix("").parts


def imported(path: Path, names: frozenset[Name] | None = None) -> Iterator[Name]:
    """Yield the modules of the toolkit that a module imports, wherever in it.

    names: of all modules. Raises ValueError for an import that is not relative, or that names no module.
    """
    known = frozenset(map(name_of, modules())) if names is None else names
    for node in ast.walk(ast.parse(path.read_text())):
        absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module or ""]
        if any(name.split(".")[0] == "ppx" for name in absolute):
            raise ValueError(f"{path}: imports are relative")
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*name_of(path)[: -node.level], *(node.module or "").split("."))
            base = tuple(part for part in base if part)
            for alias in node.names:
                found = [name for name in (base, (*base, alias.name), (*base, "__init__")) if name in known]
                if not found:
                    raise ValueError(f"{path}: imports {'.'.join(base)}.{alias.name}")
                yield found[0]


def arrows(folder: Name = ()) -> dict[str, set[str]]:
    """Return what each module or folder of a folder imports of the others in it; by default, of the packages."""
    found: dict[str, set[str]] = {}
    names = frozenset(map(name_of, modules()))
    for path in modules():
        name = name_of(path)
        for other in imported(path, names):
            if name[: len(folder)] == other[: len(folder)] == folder and name[len(folder)] != other[len(folder)]:
                found.setdefault(name[len(folder)], set()).add(other[len(folder)])
    return found


def draw() -> str:
    """Return the picture as SVG: a box per package, above those that it may import; an arrow per import of one."""
    parts, middles, top = [], {}, _GAP
    for package in reversed(ORDER):
        lines = _lines(package)
        height = 2 * _PADDING + _LINE * len(lines)
        parts.append(f'<rect x="{_LEFT}" y="{top}" width="{_BOX}" height="{height}" rx="6"/>')
        for number, (kind, text) in enumerate(lines):
            y = top + _PADDING + _LINE * number + 14
            parts.append(
                f'<text class="{kind}" x="{_LEFT + _PADDING}" y="{y}" xml:space="preserve">{escape(text)}</text>'
            )
        middles[package] = (top, height)
        top += height + _GAP
    for package, others in sorted(arrows().items()):
        parts += [_arrow(package, other, middles) for other in sorted(others)]
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    head += '<path d="M0 0 L8 4 L0 8 z" style="fill:#0969da;stroke:none"/></marker>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" height="{top}">',
            "<title>Packages of the toolkit, their modules, and which package imports which</title>",
            f"<style>{_STYLE}</style><defs>{head}</defs>",
            '<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _lines(package: str) -> list[tuple[str, str]]:
    """Return the lines of a package's box: its name, its docstring's first paragraph, its modules by folder."""
    summary = (ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())) or "").split("\n\n")[0]
    lines = [("name", f"{package}/")]
    lines += [("what", line) for line in textwrap.wrap(" ".join(summary.split()), _COLUMNS)]
    names = sorted((name[:-1], name[-1]) for path in modules() if (name := name_of(path))[0] == package)
    for folder, members in groupby(names, key=lambda name: name[0]):
        within = "/".join(folder[1:]) + "/ " if folder[1:] else ""
        text = " ".join(name for _, name in members if name != "__init__")
        lines += [("module", line) for line in textwrap.wrap(within + text, _COLUMNS, subsequent_indent="  ")]
    return lines


def _arrow(package: str, other: str, boxes: dict[str, tuple[int, int]]) -> str:
    """Return the arrow from a package to one that it imports: an arc at the right, the wider the further apart."""
    apart = ORDER.index(package) - ORDER.index(other)
    right = _LEFT + _BOX
    (begin, height), (end, high) = boxes[package], boxes[other]
    y0 = begin + height - 8 - (height - 16) * apart // (2 * len(ORDER))
    y1 = end + 8 + (high - 16) * (len(ORDER) - apart) // (2 * len(ORDER))
    bulge = right + 70 * abs(apart)
    return (
        f'<path d="M{right} {y0} C{bulge} {y0} {bulge} {y1} {right + 1} {y1}" marker-end="url(#head)">'
        f"<title>{package} imports {other}</title></path>"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw())
