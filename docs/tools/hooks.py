"""Hooks of the site: the README is the first page, links that leave docs/ reach their files.

Pages link to files outside of docs/ by their path in the repository (`../experiments/results/x.png`
say), so that they can be read there as well. The site gets a copy of each such file below `files/`;
a Markdown file becomes a page.
"""

import os
import pathlib
import posixpath
import re
import sys
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, os.fspath(_ROOT))

import afr_jax  # noqa: E402  (imports nothing until a name is used)

_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)]*)?\))")
_FILES = "files/"
# Packages whose modules have a page of reference each: `afr_jax.core` on api/core.md, and so on.
_PACKAGES = (
    "core",
    "data",
    "models",
    "perturb",
    "training",
    "recognition",
    "methods",
    "evaluation",
    "benchmark",
    "app",
)
# Pages of the menu that stand outside of docs/, by their names on the site.
_PAGES = {"index.md": "README.md", "third_party.md": "THIRD_PARTY.md"}
_NO_HEADING = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false"
_PUBLIC = "api.md"


def on_files(files: Files, config: Any) -> Files:
    """Adds pages from outside of docs/, the reference of packages, and files that pages link to."""
    for name, path in _PAGES.items():
        files.append(File.generated(config, name, content=(_ROOT / path).read_text()))
    for package in _PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=_reference(package)))
    wanted = set()
    for file in files.documentation_pages():
        for path in _outside(_source(file.src_uri), file.content_string):
            wanted.add(path)
    for path in sorted(wanted - set(_PAGES.values())):
        files.append(
            File.generated(config, f"{_FILES}{path}", abs_src_path=os.fspath(_ROOT / path))
        )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links of the site; adds the public names."""
    source = _source(page.file.src_uri)
    names = {path: name for name, path in _PAGES.items()}

    def replaced(match: re.Match[str]) -> str:
        path = _resolved(source, match.group(2))
        if path in names:
            target = names[path]
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif (_ROOT / path).is_file():
            target = f"{_FILES}{path}"
        else:
            return match.group()  # a dead link: the strict build says so
        start = posixpath.dirname(page.file.src_uri) or "."
        return match.group(1) + posixpath.relpath(target, start) + match.group(3)

    markdown = _LINK.sub(replaced, markdown)
    if page.file.src_uri == _PUBLIC:
        modules = afr_jax._MODULES
        parts = (
            f"::: {modules[name]}.{name}\n"
            f"    options:\n      heading: afr.{name}\n      heading_level: 2"
            for name in modules
        )
        markdown = "\n\n".join([markdown, *parts])
    return markdown


def _reference(package: str) -> str:
    """The page of a package's modules, made of their docstrings by mkdocstrings."""
    parts = [f"# afr_jax.{package}"]
    for path in sorted((_ROOT / "afr_jax" / package).rglob("*.py")):
        name = ".".join(path.relative_to(_ROOT).with_suffix("").parts)
        if path.name != "__init__.py":
            parts.append(f"## {name}\n\n::: {name}\n{_NO_HEADING}")
    return "\n\n".join(parts) + "\n"


def _source(src_uri: str) -> str:
    """Path in the repository of a page of the site."""
    if src_uri.startswith(_FILES):
        return src_uri.removeprefix(_FILES)
    return _PAGES.get(src_uri, f"docs/{src_uri}")


def _resolved(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _outside(source: str, markdown: str) -> list[str]:
    """Paths in the repository of the files that a page links to, outside of docs/."""
    paths = (_resolved(source, match.group(2)) for match in _LINK.finditer(markdown))
    return [path for path in paths if not path.startswith("docs/") and (_ROOT / path).is_file()]
