"""Timing of the noise search and of victims, without the other side."""

import pytest

from afr_jax.benchmark import unlearnable

_SMALL = unlearnable.UnlearnableOptions(
    num_images=64, num_blocks=(1,), width=4, batch_size=32, noise_steps=2, peak_teraflops=0.1
)


@pytest.mark.parametrize("row", ["noise", "victim"])
def test_both_kinds_of_work_are_measured(row, tmp_path):
    rows = unlearnable.measure(row, tmp_path, None, options=_SMALL, repeats=1)
    names = ["s", "teraflops/s", "share of the bare network", "share of peak"]
    assert [found["quantity"] for found in rows] == names
    seconds, rate, bare, share = (found["ours"] for found in rows)
    assert seconds["median"] > 0 and rate["median"] > 0 and bare["median"] > 0
    assert share["median"] == pytest.approx(rate["median"] / 0.1)
    assert all(found["row"].startswith(row) for found in rows)
