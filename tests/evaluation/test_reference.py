"""The protocol between us and the drivers of reference implementations."""

import sys

import numpy as np
import programs
import pytest

from afr_jax.evaluation import reference


def test_a_reference_answers_and_its_prints_do_no_harm():
    with reference.ReferenceProcess(sys.executable, programs.STUB_DRIVER) as other:
        assert other.versions == {
            "python": ".".join(map(str, sys.version_info[:3])),
            "numpy": np.__version__,
        }
        assert other.call("noise") == {"text": "wörds"}
        with pytest.raises(
            reference.ReferenceProcessError, match=r"stub_driver.py fail: ValueError: no such thing"
        ):
            other.call("fail")
        with pytest.raises(reference.ReferenceProcessError, match="KeyError"):
            other.call("unknown")
        assert other.call("noise") == {"text": "wörds"}


def test_a_reference_that_ends_is_reported_with_its_last_words():
    with reference.ReferenceProcess(sys.executable, programs.STUB_DRIVER) as other:
        with pytest.raises(reference.ReferenceProcessError, match=r"has ended:\n(.*\n)*last words"):
            other.call("crash")
        with pytest.raises(reference.ReferenceProcessError, match="has ended"):
            other.call("noise")


def test_a_reference_that_cannot_start_is_reported(tmp_path):
    with pytest.raises(reference.ReferenceProcessError, match="cannot be started"):
        reference.ReferenceProcess(tmp_path / "no_python", reference.DRIVERS / "mtcnn_driver.py")
    script = tmp_path / "program.py"
    script.write_text("import no_such_library")
    with pytest.raises(reference.ReferenceProcessError, match="No module named 'no_such_library'"):
        reference.ReferenceProcess(sys.executable, script)


def test_a_reference_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "_END_SECONDS", 0.1)
    script = tmp_path / "program.py"
    script.write_text("import signal\nprint('{\"versions\": {}}', flush=True)\nsignal.pause()")
    reference.ReferenceProcess(sys.executable, script).close()


def test_references_start_without_our_compiler_options(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ -z "$XLA_FLAGS" ] && exec "{sys.executable}" "{programs.STUB_DRIVER}"\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("XLA_FLAGS", "--an_option")
    with reference.ReferenceProcess(python, programs.STUB_DRIVER) as other:
        assert "numpy" in other.versions
