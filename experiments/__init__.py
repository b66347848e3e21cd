"""Programs, a task each: `python -m experiments.detect --help`."""

from afr_jax.core import interrupts

interrupts.end_at_once()
