"""Counts of the drill: rows by series, program and kind, the faults by name, and the table.

Faults: a crash (also a traceback that people see), a hang, a wrong status, lost work or a changed
result, an original that was changed, a file that ran code or had another one read, too much memory.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping

# What can be wrong, in the order of the table.
FAULTS = ("crashes", "hangs", "wrong", "lost", "changed", "escaped", "memory")


@dataclasses.dataclass
class Tally:
    """What the drill has seen so far.

    Attributes:
        rows: by (series, program, kind): inputs, and faults by their name in `FAULTS`.
        peaks: by (series, program): MB of the process that held most.
        faults: each with its input.
        not_run: why a series could not be run here, by name.
    """

    rows: dict[tuple[str, str, str], dict[str, int]] = dataclasses.field(default_factory=dict)
    peaks: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    faults: list[dict[str, str]] = dataclasses.field(default_factory=list)
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)

    def count(self, series: str, program: str, kind: str, *, peak_mb: float = 0.0) -> None:
        """Counts an input, and the memory of the process that worked on it."""
        row = self._row(series, program, kind)
        row["inputs"] += 1
        self.peak(series, program, peak_mb)

    def peak(self, series: str, program: str, peak_mb: float) -> None:
        """Notes the memory of a process."""
        key = series, program
        self.peaks[key] = max(self.peaks.get(key, 0.0), peak_mb)

    def fault(
        self, fault: str, series: str, program: str, kind: str, *, subject: str, text: str
    ) -> None:
        """Counts what went wrong, and says it on standard error."""
        self._row(series, program, kind)[fault] += 1
        found = {"fault": fault, "series": series, "program": program, "kind": kind}
        self.faults.append({**found, "input": subject, "text": text})
        print(f"{fault}: {series} {program} {kind}: {subject!r}: {text}", file=sys.stderr)

    def by_program(self) -> list[dict[str, object]]:
        """The rows with their kinds summed, and the peaks."""
        sums: dict[tuple[str, str], dict[str, int]] = {}
        for (series, program, _), row in self.rows.items():
            total = sums.setdefault((series, program), dict.fromkeys(row, 0))
            for name, value in row.items():
                total[name] += value
        return [
            {
                "series": series,
                "program": program,
                **total,
                "peak_mb": round(self.peaks.get((series, program), 0.0)),
            }
            for (series, program), total in sums.items()
        ]

    def result(self) -> dict[str, object]:
        """All of it as JSON can say it."""
        kinds = [
            {"series": series, "program": program, "kind": kind, **row}
            for (series, program, kind), row in self.rows.items()
        ]
        return {
            "rows": self.by_program(),
            "kinds": kinds,
            "faults": self.faults,
            "not_run": self.not_run,
        }

    def _row(self, series: str, program: str, kind: str) -> dict[str, int]:
        empty = dict.fromkeys(("inputs", *FAULTS), 0)
        return self.rows.setdefault((series, program, kind), empty)


def table(rows: Iterable[Mapping[str, object]]) -> str:
    """The rows of `Tally.by_program` in columns."""
    names = ("series", "program", "inputs", *FAULTS, "peak_mb")
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
