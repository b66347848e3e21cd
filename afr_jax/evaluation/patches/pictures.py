"""Pictures of a patch attack: bar chart of misdetection, contact sheet, film with found boxes."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import figure
from PIL import Image, ImageDraw

from afr_jax.evaluation.metrics import misdetection

_FOUND, _MISSED = (230, 60, 60), (60, 200, 90)
_COLORS = ("#1f5fa8", "#8fb8de", "#555555", "#d9b44a", "#b5838d", "#9cc29c")


def bar_chart(table: Mapping[str, misdetection.RateTable], *, title: str) -> bytes:
    """PNG of misdetection by scale factor, one bar a variant, with 95 % intervals.

    Args:
        table: What `misdetection.summarize` returns, by variant.
        title: Stands above the chart.
    """
    canvas = figure.Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = canvas.subplots()
    # Without the mean over the factors.
    by_variant = {
        variant: {factor: row for factor, row in rows.items() if isinstance(row, dict)}
        for variant, rows in table.items()
    }
    factors = list(next(iter(by_variant.values())))
    width = 0.8 / len(table)
    for number, (variant, rows) in enumerate(by_variant.items()):
        rates = [rows[factor] for factor in factors]
        height = np.array([row["rate"] or 0.0 for row in rates])
        low = np.maximum(height - [row["low"] for row in rates], 0)
        high = np.maximum([row["high"] for row in rates] - height, 0)
        places = np.arange(len(factors)) + (number - (len(table) - 1) / 2) * width
        color = _COLORS[number % len(_COLORS)]
        axes.bar(
            places, height, width * 0.92, label=variant, color=color, yerr=[low, high],
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )  # fmt: skip
    axes.set_xticks(range(len(factors)), factors)
    axes.set_xlabel("scale factor of the detector's pyramid")
    axes.set_ylabel("share of frames in which the face is missed")
    axes.set_ylim(0, 1.02)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside right upper", frameon=False, fontsize=8)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def annotate(
    pixels: np.ndarray, boxes: np.ndarray, person: np.ndarray, *, is_found: bool
) -> Image.Image:
    """A frame with the detector's boxes in red; green where the person's face was missed."""
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        pen.rectangle([float(box[k]) for k in (1, 0, 3, 2)], outline=_FOUND, width=2)
    if not is_found:
        pen.rectangle([float(person[k]) for k in (1, 0, 3, 2)], outline=_MISSED, width=2)
    return picture


def close_up(picture: Image.Image, person: np.ndarray, *, sides: float = 3.0) -> Image.Image:
    """A square of a frame about the person's box `[4]`, as many times its longer side wide."""
    side = min(sides * float(np.max(person[2:] - person[:2])), *picture.size)
    limit = np.array(picture.size[::-1]) - side
    y, x = np.clip((person[:2] + person[2:] - side) / 2, 0, limit)
    return picture.crop((round(x), round(y), round(x + side), round(y + side)))


def contact_sheet(rows: Sequence[Sequence[Image.Image]], *, cell_px: int = 160) -> bytes:
    """PNG of pictures in rows, each scaled to a width of `cell_px`."""
    height = max(round(one.height * cell_px / one.width) for row in rows for one in row)
    sheet = Image.new("RGB", (cell_px * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, one in enumerate(row):
            small = one.resize((cell_px, round(one.height * cell_px / one.width)))
            sheet.paste(small, (x * cell_px, y * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def film(pictures: Sequence[Image.Image], *, width_px: int = 400, frame_ms: int = 150) -> bytes:
    """GIF of pictures, scaled to one width."""
    # The default method drops colors of few pixels: those of the boxes.
    small = [
        one.resize((width_px, round(one.height * width_px / one.width))).quantize(
            256, method=Image.Quantize.FASTOCTREE
        )
        for one in pictures
    ]
    buffer = io.BytesIO()
    small[0].save(buffer, "GIF", save_all=True, append_images=small[1:], duration=frame_ms, loop=0)
    return buffer.getvalue()
