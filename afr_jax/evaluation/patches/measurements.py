"""Everything that is measured on one pair of trained patches, and the files that show it."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from afr_jax.core import files, workdir
from afr_jax.data import video
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import other_detectors
from afr_jax.evaluation.metrics import misdetection
from afr_jax.evaluation.patches import handling, pictures
from afr_jax.methods.patches import placement, training
from afr_jax.methods.patches.config import PatchConfig
from afr_jax.models import mtcnn
from afr_jax.recognition import detect

_ROBUST_FRAMES, _OTHER_FRAMES, _TRANSFER_FRAMES, _REFERENCE_FRAMES = 24, 40, 40, 12
_SHEET_COLUMNS, _FILM_FRAMES = 6, 60

Alteration = Callable[[np.ndarray], np.ndarray]
Patches = Mapping[str, np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class PatchStudy:
    """Patches, and the frames they are measured on.

    Attributes:
        variables: Those of MTCNN's three networks.
        config: How the patches were trained.
        trained: The patches.
        frames: With the patches placed; none of them was trained on.
        num_controls: How many of the frames, evenly spread, everything but "clean" and "trained" is
            measured on.
        work: The run's folder.
    """

    variables: mtcnn.Variables
    config: PatchConfig
    trained: training.TrainedPatches
    frames: Sequence[placement.Placed]
    num_controls: int
    work: workdir.Workdir

    def measure(self) -> dict[str, object]:
        """Rates of all variants, by scale factor; by size of the face for the trained patches.

        Every variant is kept in `judged/` when it is done, so that a stopped run goes on there.
        """
        judged = {name: self._judged(name, patches) for name, patches in self._variants().items()}
        sides = np.array([np.sqrt(np.prod(f.box[2:] - f.box[:2])) for f in self.frames])
        return {
            "num_frames": len(self.frames),
            "num_altered": sum(frame.is_altered for frame in self.frames),
            "num_control_frames": len(self._some(self.num_controls)),
            "variants": {name: self._summary(name, found) for name, found in judged.items()},
            "by_face_size": misdetection.by_size(
                judged["trained"], sides, sources=misdetection.sources_of(self.frames)
            ),
        }

    def robustness(self) -> dict[str, object]:
        """Rates when the scene is not as in training, without and with the patches."""
        frames = self._some(_ROBUST_FRAMES)
        alterations: dict[str, Alteration] = {
            "light -30 %": lambda pixels: misdetection.relight(pixels, 0.7),
            "light +30 %": lambda pixels: misdetection.relight(pixels, 1.3),
            "JPEG 50": lambda pixels: misdetection.recompress(pixels, 50),
            "half size": lambda pixels: misdetection.rescale(pixels, 0.5),
            "double size": lambda pixels: misdetection.rescale(pixels, 2.0),
        }
        scales = {"half size": 0.5, "double size": 2.0}
        rows: dict[str, object] = {
            "num_frames": len(frames),
            "scale_factor": self.config.levels.scale_factors[0],
        }
        for name, alter_fn in alterations.items():
            rows[name] = {
                variant: self._altered(frames, patches, alter_fn, scale=scales.get(name, 1.0))
                for variant, patches in self._pair().items()
            }
        return rows

    def survivors(self) -> dict[str, misdetection.Survivors]:
        """What P-Net alone still proposes of the person, without and with the patches."""
        frames, levels = self._some(_ROBUST_FRAMES), self.config.levels
        options = detect.DetectorOptions(levels.min_face_px, levels.scale_factors[0])
        return {
            name: misdetection.survivors(
                [
                    detect.detect_stages(
                        self.variables, placement.wear(frame, patches), options=options
                    ).proposals
                    for frame in frames
                ],
                [frame.box for frame in frames],
            )
            for name, patches in self._pair().items()
        }

    def handling(self) -> dict[str, object]:
        """Rates by how the patches are worn and printed, and their plot."""
        found = handling.measure(
            self.variables,
            self._some(_ROBUST_FRAMES),
            self.trained.patches,
            scale_factor=self.config.levels.scale_factors[0],
        )
        self._write("handling.png", handling.plot(found))
        return found

    def other_detectors(
        self, detectors: Mapping[str, other_detectors.Detector]
    ) -> dict[str, dict[str, misdetection.Rate]]:
        """Rates of detectors that the patches were not trained for, without and with them."""
        frames = self._some(_OTHER_FRAMES)
        rows: dict[str, dict[str, misdetection.Rate]] = {}
        for name, detect_fn in detectors.items():
            rows[name] = {}
            for variant, patches in self._pair().items():
                misses = [
                    not misdetection.is_found(detect_fn(placement.wear(frame, patches)), frame.box)
                    for frame in frames
                ]
                rows[name][variant] = misdetection.rate(
                    np.array(misses), sources=misdetection.sources_of(frames)
                )
        return rows

    def transfer(self, frames: Sequence[placement.Placed]) -> dict[str, object]:
        """Rates on frames of somebody else, without and with the patches."""
        some = _spread(frames, _TRANSFER_FRAMES)
        rows: dict[str, object] = {"num_frames": len(some)}
        for variant, patches in self._pair().items():
            rows[variant] = misdetection.summarize(
                self._judge(some, patches), sources=misdetection.sources_of(some)
            )
        return rows

    def ask_reference(self, other: reference.ReferenceProcess) -> dict[str, object]:
        """Rates of PyPI `mtcnn` itself on written frames, without and with the patches.

        It looks for faces of 20 px and more, or of 12 px where its pyramid would fail otherwise:
        "min_face_px" says which. Where it fails nevertheless there is its message and no rate.

        Args:
            other: The running package.
        """
        frames = self._some(_REFERENCE_FRAMES)
        rows: dict[str, object] = {"num_frames": len(frames), "versions": other.versions}
        with tempfile.TemporaryDirectory() as folder:
            for variant, patches in self._pair().items():
                paths = [pathlib.Path(folder) / f"{variant}_{n}.npy" for n in range(len(frames))]
                for path, frame in zip(paths, frames, strict=True):
                    np.save(path, placement.wear(frame, patches))
                rows[variant] = {
                    str(factor): _reference_rate(other, paths, frames, factor)
                    for factor in self.config.levels.scale_factors
                }
        return rows

    def write_pictures(self, *, face_width_mm: float) -> dict[str, object]:
        """Writes patches, frames, chart, contact sheet and film.

        Args:
            face_width_mm: Width of the face across the cheekbones that the page is made for.

        Returns:
            Sizes of the patches on paper and the number of frames.
        """
        folder = self.work.path
        sizes = self.trained.save(folder, face_width_mm=face_width_mm)
        kept = [frame for frame in self.frames if not frame.is_altered]
        pairs = [
            (placement.wear(frame, None), placement.wear(frame, self.trained.patches))
            for frame in kept
        ]
        for frame, pair in zip(kept, pairs, strict=True):
            misdetection.save_frame(folder, frame.name, *pair)
        self._write("misdetection.png", self._chart())
        numbers = _numbers(len(kept), _FILM_FRAMES)
        shown = [self._annotated(kept[n], pairs[n]) for n in numbers]
        self._write("patched.gif", pictures.film([patched for _, patched in shown]))
        rows = [
            [pictures.close_up(one, kept[numbers[n]].box) for one in shown[n]]
            for n in _numbers(len(shown), _SHEET_COLUMNS)
        ]
        columns = list(zip(*rows, strict=True))
        self._write("contact_sheet.png", pictures.contact_sheet(columns, cell_px=240))
        return {"paper_mm": sizes, "face_width_mm": face_width_mm, "num_frames": len(kept)}

    def _pair(self) -> dict[str, Patches]:
        return {"clean": None, "trained": self.trained.patches}

    def _variants(self) -> dict[str, Patches]:
        patches = self.trained.patches
        low, high = self.config.ink
        generator = np.random.default_rng(1)
        noise = {
            name: generator.uniform(low, high, patch.shape).astype(np.float32)
            for name, patch in patches.items()
        }
        return {
            "trained": patches,
            "clean": None,
            "black": {name: np.full_like(patch, low) for name, patch in patches.items()},
            "white": {name: np.full_like(patch, high) for name, patch in patches.items()},
            "noise": noise,
            "untrained": self.trained.start,
        }

    def _judged(self, name: str, patches: Patches) -> dict[str, np.ndarray]:
        """What `_judge` says of a variant, from the work folder if it was measured before."""
        frames = self._frames_of(name)
        path = self.work.path / "judged" / f"{name}.json"
        stored = workdir.load_or_compute(path, lambda: self._judge(frames, patches))
        return {factor: np.array(rows, bool) for factor, rows in stored.items()}

    def _summary(self, name: str, found: Mapping[str, np.ndarray]) -> misdetection.RateTable:
        return misdetection.summarize(found, sources=misdetection.sources_of(self._frames_of(name)))

    def _frames_of(self, variant: str) -> Sequence[placement.Placed]:
        return self.frames if variant in self._pair() else self._some(self.num_controls)

    def _judge(self, frames: Sequence[placement.Placed], patches: Patches) -> dict[str, np.ndarray]:
        levels = self.config.levels
        return misdetection.judge_factors(
            self.variables,
            [placement.wear(frame, patches) for frame in frames],
            [frame.box for frame in frames],
            scale_factors=levels.scale_factors,
            min_face_px=levels.min_face_px,
        )

    def _altered(
        self,
        frames: Sequence[placement.Placed],
        patches: Patches,
        alter_fn: Alteration,
        *,
        scale: float = 1.0,
    ) -> misdetection.Rate:
        found = misdetection.judge(
            self.variables,
            [alter_fn(placement.wear(frame, patches)) for frame in frames],
            [frame.box * scale for frame in frames],
            scale_factor=self.config.levels.scale_factors[0],
        )
        return misdetection.rate(~found[:, -1], sources=misdetection.sources_of(frames))

    def _annotated(
        self, frame: placement.Placed, pair: tuple[np.ndarray, np.ndarray]
    ) -> tuple[Image.Image, ...]:
        levels = self.config.levels
        options = detect.DetectorOptions(levels.min_face_px, levels.scale_factors[0])
        shown = []
        for pixels in pair:
            boxes = detect.detect_faces(self.variables, pixels, options=options).boxes
            is_found = misdetection.is_found(boxes, frame.box)
            shown.append(pictures.annotate(pixels, boxes, frame.box, is_found=is_found))
        return tuple(shown)

    def _chart(self) -> bytes:
        table = {
            name: self._summary(name, self._judged(name, patches))
            for name, patches in self._variants().items()
        }
        controls = len(self._some(self.num_controls))
        title = f"MTCNN, {self.config.placement}: {len(self.frames)} frames, controls {controls}"
        return pictures.bar_chart(table, title=title)

    def _some(self, count: int) -> list[placement.Placed]:
        return _spread(self.frames, count)

    def _write(self, name: str, data: bytes) -> None:
        files.write_atomically(self.work.path / name, data, overwrite=True)


def _reference_rate(
    other: reference.ReferenceProcess,
    paths: Sequence[pathlib.Path],
    frames: Sequence[placement.Placed],
    factor: float,
) -> dict[str, object]:
    smallest = _reference_min_face(frames, factor)
    options = detect.DetectorOptions(min_face_px=smallest, scale_factor=factor)
    try:
        _, found = other_detectors.ask_mtcnn(other, paths, options)
    except reference.ReferenceProcessError as error:
        return {"failed": str(error)}
    misses = [
        not misdetection.is_found(faces.boxes, frame.box)
        for faces, frame in zip(found, frames, strict=True)
    ]
    found_rate = misdetection.rate(np.array(misses), sources=misdetection.sources_of(frames))
    return {**found_rate, "min_face_px": smallest}


def _reference_min_face(frames: Sequence[placement.Placed], factor: float) -> float:
    """Smallest face that PyPI `mtcnn` can be asked for, of 20 and 12 px.

    The package counts its levels without regard to the smallest face, which at 20 px and most
    factors leaves a last level smaller than P-Net's field.
    """
    for frame in frames:
        side = min(frame.pixels.shape[:2])
        count = round(-(np.log(side / 12) / np.log(factor) + 1))
        if int(side * 12 / 20 * factor ** (count - 1)) < 12:
            return 12.0
    return 20.0


def _spread(frames: Sequence[placement.Placed], count: int) -> list[placement.Placed]:
    return [frames[number] for number in _numbers(len(frames), count)]


def _numbers(total: int, count: int) -> list[int]:
    return video.spread(total, min(total, count))
