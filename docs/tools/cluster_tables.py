"""Tables of runs that share photos, and of what programs hold while many photos stream through."""

import numpy as np

from docs.tools import markdown
from docs.tools.markdown import table


@table("workers", "workers.json")
def workers() -> str:
    """What came of each case of `tests.drill.workers`."""
    head = (
        *(
            "photos",
            "runs",
            "killed",
            "in `faces.json`",
            "lost",
            "done twice",
            "peak MB of each run",
        ),
        "seconds",
    )
    rows = [
        [
            f"{row['photos']:,}",
            str(row["workers"]),
            {0: "-", 1: "one, once", 2: "one, twice"}[row["kills"]],
            f"{row['photos'] - row['lost']:,}",
            str(row["lost"] + row["listed_twice"]),
            str(row["done_twice"]),
            " / ".join(map(str, row["peak_mb"])),
            str(row["seconds"]),
        ]
        for row in markdown.result("workers")["rows"]
    ]
    return markdown.render(head, rows, right=6)


@table("memory", "memory.json")
def memory() -> str:
    """What programs held while photos streamed through them, by `tests.drill.memory`."""
    measured = markdown.result("memory")
    lines = []
    for row in measured["rows"]:
        counts, held = np.array(row["samples"], float).T
        # From a third on: what is held at first is the programs' own.
        later = counts > measured["photos"] / 3
        slope, _ = np.polyfit(counts[later], held[later], 1)
        cells = (f"{measured['photos']:,}", f"{row['peak_mb']:,}", f"{1e4 * slope:.1f}")
        lines.append([f"`{row['program']}`", *cells, f"{row['seconds']:,}"])
    head = ("program", "photos", "peak MB", "MB more for 10,000 photos", "seconds")
    return markdown.render(head, lines, right=4)
