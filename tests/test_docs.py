"""README and docs: generated parts are fresh, Python runs, shell lines are what programs accept."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
from typing import NamedTuple

import av
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import programs
import pytest

import afr_jax
from afr_jax import cli
from afr_jax.core import program
from afr_jax.data import video
from afr_jax.methods.patches import scenes
from afr_jax.models.classifiers import registry as classifiers
from afr_jax.models.extractors import registry as extractors
from docs.tools import markdown, pages, reproduction_tables

_ROOT = pages.ROOT
_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SKIPPED = "Not run in the tests: "
_LANGUAGES = ("python", "sh")


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        page: its path below the root.
        line: of the page, of its first line of code.
        language: "python" or "sh".
        reason: why it is not run, or None.
        code: its text.
    """

    page: str
    line: int
    language: str
    reason: str | None
    code: str


def _blocks(page, language):
    text = page.read_text()
    for match in _FENCE.finditer(text):
        title = re.search(r'title="(.*)"', match[2])
        reason = title[1].removeprefix(_SKIPPED) if title and _SKIPPED in title[1] else None
        line = text[: match.start(3)].count("\n") + 1
        block = Block(str(page.relative_to(_ROOT)), line, match[1], reason, match[3])
        assert block.language in _LANGUAGES, f"{block.page}:{line}: {block.language}"
        if block.language == language:
            yield block


def _commands():
    """The commands of shell blocks and of the README's set-up, each once, as tuples of words."""
    return dict.fromkeys(tuple(shlex.split(line)) for line in _command_lines())


def _command_lines():
    for page in pages.pages():
        for block in _blocks(page, "sh"):
            if block.reason is None:
                yield from block.code.replace("\\\n", " ").splitlines()
    for line in re.findall(r"^    (python .*)$", (_ROOT / "README.md").read_text(), re.MULTILINE):
        yield from line.split(" && ")


_PYTHON_PAGES = [page for page in pages.pages() if any(_blocks(page, "python"))]


def test_generated_parts_are_fresh():
    stale = [str(path.relative_to(_ROOT)) for path in pages.stale()]
    assert not stale, f"run `python -m docs.tools`: {', '.join(stale)}"


def test_each_table_stands_on_a_page():
    assert pages.used_tables() == set(markdown.TABLES)


def test_tables_name_the_files_that_they_are_made_of(monkeypatch):
    opened = set()
    for reader, suffix in (("result", "json"), ("records", "csv")):
        original = getattr(markdown, reader)
        monkeypatch.setattr(
            markdown,
            reader,
            lambda name, original=original, suffix=suffix: (
                opened.add(f"{name}.{suffix}") or original(name)
            ),
        )
    for name, table in markdown.TABLES.items():
        opened.clear()
        table.make()
        assert opened == set(table.sources), name


def test_each_result_with_a_command_is_shown_or_linked():
    shown = {name for name in markdown.TABLES for name in markdown.TABLES[name].sources}
    texts = "".join(page.read_text() for page in pages.pages())
    for path in sorted(markdown.RESULTS.iterdir()):
        if path.suffix in (".json", ".csv", ".png", ".md"):
            assert path.name in shown or path.name in texts, path.name


def test_readme_is_one_page():
    text = (_ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1
    assert len(list(_blocks(_ROOT / "README.md", "python"))) == 4


def test_pages_do_not_name_machines_or_hosts():
    for page in pages.pages():
        for word in ("/tmp/", "/home/", "/root/", "localhost"):
            assert word not in page.read_text(), (page, word)


def test_links_lead_somewhere_in_the_repository():
    for page in pages.pages():
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(_ROOT)}: {link}"


def test_each_requirement_has_its_reason_in_the_docs():
    text = (_ROOT / "docs" / "development.md").read_text()
    kinds = ("", "-app", "-test", "-docs")
    for file in (f"requirements{kind}.txt" for kind in kinds):
        for line in (_ROOT / file).read_text().splitlines():
            name = re.match(r"[\w-]+", line)
            if name and not line.startswith(("-r", "#")):
                assert f"`{name[0]}`" in text, f"{name[0]} of {file}"


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=" ".join(words)) for words in _commands()]
)
def test_shell_lines_are_what_programs_accept(words):
    words = list(words)
    if words[0] in ("sbatch", "launch/local.sh"):
        script = next(word for word in words if word.startswith("launch/"))
        assert os.access(_ROOT / script, os.X_OK) or words[0] == "sbatch"
        if re.fullmatch("@.*/commands", words[-1]):  # The cells of a sweep.
            return
        start = next(i for i, word in enumerate(words) if word.startswith("experiments."))
        words = ["python", "-m", *words[start:]]
    if words[0] == "afr":
        words = ["python", "-m", f"experiments.{words[1]}", *words[2:]]
    assert words[:2] == ["python", "-m"], words
    module, flags = words[2], words[3:]
    if module == "pip":
        assert all((_ROOT / word).is_file() for word in flags if word.endswith(".txt"))
    elif module == "pytest":
        assert importlib.util.find_spec("xdist") or "-n" not in flags
    elif module == "docs.tools":
        assert set(flags) <= {"--check"}
    else:
        assert (_ROOT / f"{module.replace('.', '/')}.py").is_file()
        home, config_class = cli.PROGRAMS[module.rpartition(".")[2]]
        program.parse(getattr(importlib.import_module(home), config_class), flags)


# How the snippets' configs are cut down, by name.
_NETWORK = classifiers.ClassifierOptions(architecture="small_resnet", width=4)
_SMALLER = {
    "FawkesConfig": lambda config: dataclasses.replace(config, num_steps=2),
    "PatchConfig": lambda config: dataclasses.replace(
        config,
        epochs=2,
        patch_px=8,
        levels=scenes.LevelOptions(scale_factors=(0.709,), window_ratios=(0.8, 1.25), draws=1),
    ),
    "ErrorMin": lambda config: dataclasses.replace(config, network=_NETWORK).with_search(
        num_steps=1, train_steps=1, max_rounds=1, batch_size=8
    ),
    "VictimOptions": lambda config: dataclasses.replace(
        config, network=_NETWORK, num_epochs=2, batch_size=8
    ),
}


@pytest.fixture
def small_world(shared, tmp_path, monkeypatch):
    """A folder with what the snippets read, and configs with few steps."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    for name, smaller in _SMALLER.items():
        config_class = getattr(afr_jax, name)
        small = functools.partial(_small, config_class, smaller)
        monkeypatch.setattr(afr_jax, name, small, raising=False)
    for name, defaults in (
        # Against one extractor, so that all pages share a compiled program.
        ("cloak", {"surrogates": ("dlib",)}),
        ("train_victim", {"options": afr_jax.VictimOptions()}),
        ("misdetection", {"scale_factors": (0.709,)}),
    ):
        smaller_call = functools.partial(getattr(afr_jax, name), **defaults)
        monkeypatch.setattr(afr_jax, name, smaller_call, raising=False)
    # A page adds to it.
    monkeypatch.setattr(extractors, "EXTRACTORS", dict(extractors.EXTRACTORS))
    _write_photos(shared)
    for name, film in (("monday.mp4", "again.mkv"), ("tuesday.mp4", "yes.mkv")):
        _write_film(name, shared / "data" / "video" / film)
    for split in ("train", "test"):
        programs.save_synthetic(split, 16, num_classes=2, side=16, split=split)
    yield
    plt.close("all")


def _small(config_class, smaller, **given):
    return smaller(config_class(**given))


def _write_photos(shared):
    """Folders `people`, `photos` and `queries`, and a pair of photos, of two people of LFW."""
    for person in ("Hans_Blix", "Kofi_Annan"):
        files = sorted((shared / "data" / "lfw" / person).iterdir())[:4]
        for folder in (f"people/{person}", "queries"):
            os.makedirs(folder, exist_ok=True)
        for path in files:
            shutil.copy(path, f"people/{person}")
        shutil.copy(files[-1], "queries")
    os.makedirs("photos")
    for name, index in (("a.jpg", 0), ("photos/a.jpg", 0), ("b.jpg", 1)):
        path = sorted((shared / "data" / "lfw" / "Hans_Blix").iterdir())[index]
        shutil.copy(path, name)


def _write_film(path, source):
    """Two frames of a film, half as large."""
    with av.open(path, "w") as file:
        stream = None
        for frame in video.read_frames(source, max_frames=2).frames:
            small = np.ascontiguousarray(frame.pixels[::2, ::2])
            if stream is None:
                stream = file.add_stream("mpeg4", rate=5)
                stream.height, stream.width = small.shape[:2]
                stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
            file.mux(stream.encode(av.VideoFrame.from_ndarray(small, format="rgb24")))
        file.mux(stream.encode())


@pytest.mark.shared
@pytest.mark.parametrize("page", [str(page.relative_to(_ROOT)) for page in _PYTHON_PAGES])
def test_python_runs(page, small_world):
    blocks = list(_blocks(_ROOT / page, "python"))
    if page == "docs/tutorial.md":
        notebook = json.loads((_ROOT / "docs" / "tutorial.ipynb").read_text())
        cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert ["".join(cell) for cell in cells] == [block.code.strip("\n") for block in blocks]
    namespace = {"__name__": "__main__"}
    for block in blocks:
        # With the lines of the page in tracebacks.
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, str(_ROOT / page), "exec"), namespace)


@pytest.mark.parametrize(
    "published, without, ours, expected",
    [
        (0.95, 0.0, 0.90, "reproduced"),
        (0.95, 0.0, 1.0, "reproduced"),
        (0.95, 0.0, 0.89, "in kind"),
        (0.95, 0.0, 0.47, "**not reproduced**"),
        # Less is more: noise that keeps a network from learning.
        (0.20, 0.94, 0.10, "reproduced"),
        (0.20, 0.94, 0.50, "in kind"),
        (0.20, 0.94, 0.60, "**not reproduced**"),
    ],
)
def test_verdicts_follow_the_rule_of_the_page(published, without, ours, expected):
    assert reproduction_tables.verdict(published, without, ours) == expected
