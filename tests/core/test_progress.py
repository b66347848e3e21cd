import io
import sys
import time

import pytest

from afr_jax.core import progress


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_a_bar_on_a_terminal(monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress.track(3, description="photos")) == [0, 1, 2]
    assert "photos" in terminal.getvalue() and "3/3" in terminal.getvalue()


@pytest.mark.parametrize(
    "force, environment, is_shown", [(None, "0", False), (None, "1", True), (True, "0", True)]
)
def test_progress_elsewhere_logs_only_when_forced(
    monkeypatch, caplog, force, environment, is_shown
):
    monkeypatch.setenv("AFR_PROGRESS", environment)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level("INFO", logger="absl"):
        items = progress.track(iter("ab"), description="photos", total=2, force=force)
        assert list(items) == ["a", "b"]
    assert ("photos: 2/2" in caplog.text) == is_shown


def test_progress_logs_once_in_an_interval(monkeypatch, caplog):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level("INFO", logger="absl"):
        list(progress.track(iter(range(9)), description="steps", force=True))
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "steps: 3",
        "steps: 6",
        "steps: 9",
    ]
