import io
import os
import sys
import time

import pytest

from afr_jax.core import parallel, progress


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_a_bar_on_a_terminal(monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress.track(range(3), description="photos")) == [0, 1, 2]
    assert "photos" in terminal.getvalue() and "3/3" in terminal.getvalue()


@pytest.fixture
def batch_job(monkeypatch, caplog):
    """No terminal, and a clock that goes on by ten seconds whenever it is read."""
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level("INFO", logger="absl"):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_a_batch_job_gets_lines_with_rate_and_time_left(batch_job):
    assert list(progress.track(iter("abcdefgh"), description="photos", total=8)) == [*"abcdefgh"]
    lines = batch_job()
    # At the third step 40 s have gone by, and five steps are left.
    assert lines[0] == "photos: 3 of 8, 0.075/s, 1:07 left"
    assert lines[-1].startswith("photos: 8 of 8") and "left" not in lines[-1]


def test_a_resumed_run_counts_on_and_reckons_with_its_own_steps(batch_job):
    with progress.counter(5000, description="steps", done=1000) as advance:
        for _ in range(3):
            advance(100)
    assert batch_job() == ["steps: 1300 of 5000, 7.5/s, 8:13 left"]


def test_what_is_over_at_once_says_nothing(batch_job):
    with progress.counter(None, description="photos") as advance:
        advance(1)
    assert batch_job() == []


def test_a_warning_is_one_line_of_valid_text_whatever_the_name(caplog):
    progress.warn(os.fsdecode(b"caf\xe9\n\x1b[2J \xe6\x9d\x8e.png"), ValueError("no\rface"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == r"caf\udce9\n\x1b[2J 李.png: no\rface"
    assert caplog.records[0].filename == "test_progress.py"


def test_listeners_hear_every_step_in_place_of_standard_error(batch_job):
    heard = []
    with progress.told_to(lambda *words: heard.append(words)):
        assert list(progress.track(range(2), description="photos")) == [0, 1]
        with progress.counter(None, description="faces", done=5) as advance:
            advance(3)
    assert heard == [
        *(("photos", 0, 2), ("photos", 1, 2), ("photos", 2, 2)),
        *(("faces", 5, None), ("faces", 8, None)),
    ]
    assert batch_job() == []
    list(progress.track(iter("abcdefgh"), description="photos", total=8))
    assert batch_job()


def test_steps_are_counted_from_any_thread(batch_job):
    inside, heard = [], []

    def listen(description, count, total):
        inside.append(count)
        heard.append((count, len(inside)))
        inside.pop()

    with progress.told_to(listen), progress.counter(400, description="faces") as advance:
        parallel.thread_map(lambda _: advance(1), range(400), width=8)
    # In order, and never two at a time.
    assert heard == [(count, 1) for count in range(401)]
