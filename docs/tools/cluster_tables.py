"""The table of runs that share photos while one of them is killed."""

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
