"""What this toolkit takes from ``huggingface_hub``: public names only, all there, with the parameters that are used.

A release that moves one of them breaks every import of the toolkit. This file imports none of it, and names each:
``pytest tests/test_hub_client.py --noconftest``.
"""

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(path for folder in ("convert", "verify", "recipes") for path in (ROOT / folder).rglob("*.py"))
PARAMETERS = {
    ("huggingface_hub", "hf_hub_url"): {"repo_id", "filename", "revision"},
    ("huggingface_hub", "snapshot_download"): {"repo_id", "revision", "allow_patterns", "local_files_only"},
    ("huggingface_hub.file_download", "repo_folder_name"): {"repo_id", "repo_type"},
    ("huggingface_hub.utils", "WeakFileLock"): {"lock_file"},
    ("huggingface_hub.utils", "http_backoff"): {"method", "url"},
    ("huggingface_hub.utils", "parse_ratelimit_headers"): {"headers"},
}


def used() -> dict[tuple[str, str], list[str]]:
    """Return module and name of all that is imported from the client, or called on its HfApi, with the users."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in FILES:
        text, user = path.read_text(), f"{path.parent.name}/{path.name}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "huggingface_hub":
                for alias in node.names:
                    found.setdefault((node.module, alias.name), []).append(user)
        for method in sorted(set(re.findall(r"\bapi\.(\w+)\(", text))):
            found.setdefault(("huggingface_hub", f"HfApi.{method}"), []).append(user)
    return found


def problem(name: tuple[str, str], users: Sequence[str]) -> str | None:
    """Return what is wrong with a name, None if nothing is."""
    module, path = name
    message = f"{module}.{path}, which {', '.join(users)} needs"
    if any(part.startswith("_") for part in (*module.split("."), *path.split("."))):
        return f"{message}: is private"
    held: Any = importlib.import_module(module)
    for part in path.split("."):
        held = getattr(held, part, None)
    if held is None:
        return f"{message}: is not there"
    lacking = PARAMETERS[name] - inspect.signature(held).parameters.keys() if name in PARAMETERS else set()
    return f"{message}: takes no {', '.join(sorted(lacking))}" if lacking else None


def test_what_is_used_of_the_client_is_public_and_there():
    names = used()
    assert names.keys() >= PARAMETERS.keys() | {("huggingface_hub", "HfApi.list_repo_tree")}
    assert [found for name, users in names.items() if (found := problem(name, users))] == []


def test_a_name_that_moved_is_told_with_its_user():
    message = problem(("huggingface_hub.utils", "gone"), ["convert/hub.py"])
    assert message == "huggingface_hub.utils.gone, which convert/hub.py needs: is not there"
    message = problem(("huggingface_hub.utils._http", "get_session"), ["x"])
    assert message == "huggingface_hub.utils._http.get_session, which x needs: is private"


def test_the_version_has_a_lower_and_an_upper_bound():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(re.fullmatch(r"huggingface_hub>=[\d.]+,<[\d.]+", one) for one in needed)
