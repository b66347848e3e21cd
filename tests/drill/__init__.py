"""The reliability drill: damaged inputs, signals, races, full disks and flipped bits, counted.

    python -m tests.drill --inputs=100 --workdir=out/drill

A program is run as people run it, as a process; what it may say about an input is known from how
the input was made.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Writers of weight files, which the tests import by their plain names, are used here as well.
sys.path.insert(0, str(ROOT / "tests"))
