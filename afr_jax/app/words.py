"""Words of the page that carry measured figures."""

from typing import NamedTuple


class ModeWords(NamedTuple):
    """A strength of a cloak as the page puts it.

    Attributes:
        title: its name.
        seen: what people see of it.
        least: clean probes missed by the nearest neighbor in percent, written as PNG, of the
            extractor without a part that missed fewest, of the two draws of people in
            `experiments/results/protection_modes.json` and `protection_second_draw.json`.
        most: likewise, of the one that missed most.
    """

    title: str
    seen: str
    least: int
    most: int

    @property
    def worth(self) -> str:
        """What it was measured to be worth."""
        if self.least == self.most:
            return f"In trials, other recognizers missed {self.least} % of the searches."
        return f"In trials, other recognizers missed {self.least} to {self.most} % of the searches."


MODES = {
    "low": ModeWords(
        "Low", "Hardly anything is seen; on most faces, even when photos alternate.", 27, 82
    ),
    "mid": ModeWords("Mid", "Hardly told apart side by side. The usual choice.", 83, 100),
    "high": ModeWords("High", "May be seen on smooth skin by who looks closely.", 100, 100),
}
