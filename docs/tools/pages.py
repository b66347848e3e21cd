"""Generated parts of the pages: tables between markers, and the tutorial's notebook.

A page says where a table stands:

    <!-- table: protection -->
    <!-- end -->

and `updated` writes between the two lines what the table's function in `docs.tools` makes of the
result files, and their names.
"""

import json
import os
import pathlib
import re

from docs.tools import (  # noqa: F401  (the modules register their tables)
    benchmark_tables,
    cloaking_tables,
    cluster_tables,
    markdown,
    patch_tables,
    provenance_tables,
    recognition_tables,
    reliability_tables,
    reproduction_tables,
    unlearnable_tables,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = {DOCS / "tutorial.ipynb": DOCS / "tutorial.md"}

_MARKED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
_CODE = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def pages() -> list[pathlib.Path]:
    """The README and all pages of docs/."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def generated() -> dict[pathlib.Path, str]:
    """What each generated or partly generated file must hold: the pages and the notebook.

    Raises:
        KeyError: a page asks for a table that does not exist.
    """
    texts = {page: _filled(page) for page in pages()}
    return texts | {file: _notebook(texts[page]) for file, page in NOTEBOOKS.items()}


def stale() -> list[pathlib.Path]:
    """The files that differ from what `generated` makes of the results."""
    return [
        path for path, text in generated().items() if not path.is_file() or path.read_text() != text
    ]


def update() -> list[pathlib.Path]:
    """Writes the stale files and returns their paths."""
    paths, texts = stale(), generated()
    for path in paths:
        path.write_text(texts[path])
    return paths


def used_tables() -> set[str]:
    """Names of the tables that stand on some page."""
    return {name for page in pages() for name in _MARKED.findall(page.read_text())}


def _filled(page: pathlib.Path) -> str:
    return _MARKED.sub(lambda match: _block(page, match.group(1)), page.read_text())


def _block(page: pathlib.Path, name: str) -> str:
    table = markdown.TABLES[name]
    lines = [f"<!-- table: {name} -->", table.make()]
    if table.has_source_line:
        lines += ["", f"<small>{_sources(page, table.sources)}</small>"]
    return "\n".join([*lines, "<!-- end -->"])


def _sources(page: pathlib.Path, names: tuple[str, ...]) -> str:
    folder = os.path.relpath(markdown.RESULTS, page.parent)
    return "From " + ", ".join(f"[{name}]({folder}/{name})" for name in names)


def _notebook(text: str) -> str:
    """A page as a notebook: its Python blocks are code cells, the rest is Markdown."""
    cells = []
    for index, part in enumerate(_CODE.split(text)):
        source = part.strip("\n")
        if source:
            cells.append(_cell("code" if index % 2 else "markdown", source, len(cells)))
    notebook = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, source: str, index: int) -> dict[str, object]:
    cell: dict[str, object] = {
        "cell_type": kind,
        "id": f"cell-{index}",
        "metadata": {},
        "source": source.splitlines(keepends=True),
    }
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
