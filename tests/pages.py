"""The code on the documentation's pages: files (by a block's first line) and commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """What stands between ``` and ```, of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def write_files(page: Path, folder: Path) -> list[str]:
    """Write the page's Python and TOML blocks as the files that they name; their names."""
    names = []
    for language, suffix in (("python", "py"), ("toml", "toml")):
        for text in blocks(page, language):
            found = re.match(rf"# (\w+\.{suffix})\n", text)
            assert found, f"{page.name}: a block names no file in its first line:\n{text}"
            (folder / found[1]).write_text(text)
            names.append(found[1])
    return names


def commands(page: Path) -> list[list[str]]:
    """The lines of the page's sh blocks, in words."""
    lines = [line for text in blocks(page, "sh") for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]
