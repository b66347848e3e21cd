"""Runs a program that is killed when it has published so many files, as by a power cut.

    python -m tests.killed PATTERN COUNT experiments.cloak --images=photos

SIGKILL comes when a file or folder whose path matches the regular expression is to be given its
name for the COUNT-th time, so that COUNT - 1 are there.
"""

import os
import re
import runpy
import signal
import sys

_PUBLISHING = ("os.rename", "os.link")


def main() -> None:
    """Takes its own arguments from the command line, and runs the program with the others."""
    pattern, count, module, *arguments = sys.argv[1:]
    remaining = int(count)

    def look(event, values):
        nonlocal remaining
        if event in _PUBLISHING and re.search(pattern, os.fsdecode(values[1])):
            remaining -= 1
            if not remaining:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
