"""Faces beside their cloaks of several budgets, enlarged, for people to judge what is seen."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from afr_jax.core import files, options, program, progress, workdir
from afr_jax.data import photos
from afr_jax.evaluation.cloaking import cells, cloak_files
from afr_jax.methods.cloaking import face_filter, workflow
from afr_jax.recognition import pipeline, shared_options

_CAPTION_PX, _FONT_PX = 20, 12
_FIGURES = "SSIMU2 {:.0f} ({:.0f}), CIEDE2000 {:.1f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModeSheetConfig(options.Config):
    """Shows faces beside their cloaks of several budgets, enlarged.

        python -m experiments.studies.mode_sheet --images=photos --workdir=out/sheet

    Each row is the largest face of a photo: the original, then its cloak within each of --budgets,
    with SSIMULACRA2 (in brackets looked at closely) and the 99th percentile of CIEDE2000 of the
    region that changed. Each photo is cloaked by itself, without other photos of the person.

    Writes `sheet.png` and `result.json`, with all figures. Exit code 3: a photo could not be read,
    or no face of it was cloaked.
    """

    images: tuple[str, ...] = options.option(
        (), "photos, and folders of photos; default: a portrait"
    )
    budgets: tuple[str, ...] = options.option(
        ("low", "mid", "high"), "modes, or DSSIM: what the cloaks of a row may cost"
    )
    surrogates: tuple[str, ...] = options.option(
        cloak_files.DEFAULT_SURROGATES, "extractors to cloak against"
    )
    weights: tuple[str, ...] = options.option((), "weight files: NAME=FILE")
    num_steps: int | None = options.option(
        None, "gradient steps of a cloak; default: the method's own", at_least=0
    )
    face_px: int = options.option(240, "side of a picture of a face, pixels", at_least=48)
    workdir: str | None = options.option("out/mode_sheet", options.WORKDIR_HELP)

    def __post_init__(self) -> None:
        """Checks the budgets."""
        super().__post_init__()
        for budget in self.budgets:
            cells.parse_budget(budget)

    def toy(self) -> "ModeSheetConfig":
        """Two steps against dlib."""
        small = {"num_steps": 2, "surrogates": ("dlib",), "face_px": 96}
        return options.fill_defaults(self, small)


def run(config: ModeSheetConfig) -> options.Outcome:
    """Cloaks the photos within each budget and draws the sheet.

    Raises:
        options.UsageError: photos, extractors or weights that are not to be had, or a work
            directory of another run.
    """
    with options.usage("--images"):
        sources = photos.list_sources(config.images or (shared_options.sample_portrait(),))
    with options.usage("--surrogates"):
        weights = pipeline.parse_weights(config.weights, config.surrogates)
        recognizer = pipeline.load_recognizer(*config.surrogates, weights=weights)
    work = workdir.open_workdir(config.workdir or "out/mode_sheet", config)
    lines, rows, problems = [], [], []
    for source in progress.track(sources, description="photos"):
        try:
            pixels = photos.read_source(source).pixels
        except photos.PhotoError as error:
            problems.append({"image": source.name, "reason": str(error)})
            continue
        line, row = [], []
        for budget in config.budgets:
            (done,) = workflow.cloak(
                recognizer,
                pixels,
                config=cells.cloak_method(
                    "fawkes", cells.parse_budget(budget), num_steps=config.num_steps
                ),
                face_filter=face_filter.FaceFilter(faces="largest"),
            )
            (face,) = [face for face in done.faces if face["status"] == "cloaked"] or [None]
            if face is None or done.pixels is None:
                problems.append({"image": source.name, "reason": f"{budget}: {done.reason}"})
                break
            if not line:
                line.append(_cell(pixels, face["box"], source.name, config.face_px))
            figures = {"dssim": face["dssim"], **face["visibility"]}
            text = _FIGURES.format(
                *(figures[key] for key in ("ssimulacra2", "ssimulacra2_close", "ciede2000_p99"))
            )
            line.append(_cell(done.pixels, face["box"], f"{budget}: {text}", config.face_px))
            row.append({"image": source.name, "budget": budget, **figures})
        lines += [line] * bool(line)
        rows += row
    if lines:
        files.write_atomically(work.path / "sheet.png", _sheet(lines), overwrite=True)
    result = {
        **program.provenance("experiments.studies.mode_sheet", config=config),
        "faces": len(lines),
        "rows": rows,
        "not_handled": problems,
    }
    work.write_result(result)
    return options.Outcome(result, complete=not problems)


def _cell(pixels: np.ndarray, box: list[int], text: str, side: int) -> Image.Image:
    """A face, enlarged to a height, with a caption below."""
    y0, x0, y1, x1 = box
    face = Image.fromarray(pixels[y0:y1, x0:x1])
    width = round(face.width * side / face.height)
    cell = Image.new("RGB", (max(width, side), side + _CAPTION_PX), "white")
    cell.paste(face.resize((width, side), Image.Resampling.LANCZOS), ((cell.width - width) // 2, 0))
    pen = ImageDraw.Draw(cell)
    font = ImageFont.load_default(size=_FONT_PX)
    while len(text) > 1 and pen.textlength(text, font=font) > cell.width - 4:
        text = text[:-1]
    pen.text((2, side + 2), text, fill="black", font=font)
    return cell


def _sheet(lines: list[list[Image.Image]]) -> bytes:
    """PNG of rows of cells."""
    width = max(sum(cell.width for cell in line) for line in lines)
    height = sum(line[0].height for line in lines)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for line in lines:
        left = 0
        for cell in line:
            sheet.paste(cell, (left, top))
            left += cell.width
        top += line[0].height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
