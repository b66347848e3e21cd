"""Fills the tables of README and docs from experiments/results, and writes the notebook.

python -m docs.tools           # writes what is stale
python -m docs.tools --check   # names what is stale, exit code 1
"""

import argparse
import sys

from docs.tools import pages


def main() -> int:
    """Writes the generated parts of the pages, or checks them."""
    parser = argparse.ArgumentParser(prog="python -m docs.tools", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    check = parser.parse_args().check
    paths = pages.stale() if check else pages.update()
    for path in paths:
        print(f"{'stale' if check else 'written'}: {path.relative_to(pages.ROOT)}")
    return int(check and bool(paths))


if __name__ == "__main__":
    sys.exit(main())
