"""The README's picture, from the output of `python -m experiments.cloak`.

python -m experiments.results.portrait
"""

import json
import pathlib

import numpy as np
import skimage
from PIL import Image

from afr_jax.evaluation.report import pictures

_MARGIN, _ENLARGED_PX = 24, 400


def main() -> None:
    """Writes portrait.png (before, after, change times ten) beside this file."""
    output = pathlib.Path("out/cloak")
    record = json.loads((output / "report.json").read_text())["images"][0]
    source = pathlib.Path(skimage.__file__).parent / "data" / record["image"]
    y0, x0, y1, x1 = record["faces"][0]["box"]
    crop = slice(max(y0 - _MARGIN, 0), y1 + _MARGIN), slice(max(x0 - _MARGIN, 0), x1 + _MARGIN)
    before, after = (
        np.asarray(Image.open(path).convert("RGB"))[crop]
        for path in (source, output / record["output"])
    )
    row = np.concatenate([before, after, pictures.amplified_difference(before, after)], axis=1)
    scale = _ENLARGED_PX / before.shape[0]
    picture = Image.fromarray(row).resize(
        (round(row.shape[1] * scale), _ENLARGED_PX), Image.LANCZOS
    )
    picture.save(pathlib.Path(__file__).parent / "portrait.png", optimize=True)


if __name__ == "__main__":
    main()
