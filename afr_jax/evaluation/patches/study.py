"""Everything that is measured on one pair of trained patches, and the files that show it."""

import dataclasses
import io
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from afr_jax.core import files, progress, workdir
from afr_jax.data import video
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import other_detectors
from afr_jax.evaluation.metrics import misdetection
from afr_jax.evaluation.patches import pictures as patches_pictures
from afr_jax.methods.patches import config, geometry, placement, print_sheet
from afr_jax.perturb import warps
from afr_jax.recognition import detect

_ROBUST_FRAMES, _OTHER_FRAMES, _TRANSFER_FRAMES, _PEER_FRAMES = 24, 40, 40, 12
_SHEET_COLUMNS, _FILM_FRAMES = 6, 60

Alteration = Callable[[np.ndarray], np.ndarray]


class Shown(NamedTuple):
    """A frame with its person, and where the patches lie on it."""

    person: misdetection.Person
    placed: placement.Placed


def others(yunet: str | None, haar: str | None) -> dict[str, other_detectors.Detector]:
    """The other detectors that can run here; see `other_detectors.available`."""
    return other_detectors.available(yunet_path=yunet, haar_path=haar)


@dataclasses.dataclass(frozen=True)
class Study:
    """Patches, and the frames they are measured on.

    Attributes:
        variables: of the three networks.
        options: the patches were trained with.
        frames: none of which was trained on.
        patches: name -> `[h, w]` in [0, 1], as printed.
        start: what they were before the training.
        num_controls: of the frames, evenly spread, for all but "clean" and "trained".
        work: the run's folder.
    """

    variables: dict
    options: config.PatchConfig
    frames: Sequence[Shown]
    patches: Mapping[str, np.ndarray]
    start: Mapping[str, np.ndarray]
    num_controls: int
    work: workdir.Workdir

    def measure(self) -> dict[str, Any]:
        """Rates of all variants, by scale factor; by size of the face for the trained patches.

        Every variant is kept in `judged/` when it is done, so that a stopped run goes on there.
        """
        some = self._some(self.num_controls)
        table = {}
        judged = {}
        for name, patches in self._variants().items():
            frames = self.frames if name in ("clean", "trained") else some
            judged[name] = self._kept(name, frames, patches)
            table[name] = misdetection.summarise(judged[name])
        sides = np.array(
            [np.sqrt(np.prod(f.placed.box[2:] - f.placed.box[:2])) for f in self.frames]
        )
        return {
            "num_frames": len(self.frames),
            "num_altered": sum(frame.person.is_altered for frame in self.frames),
            "num_control_frames": len(some),
            "variants": table,
            "by_face_size": misdetection.by_size(judged["trained"], sides),
        }

    def robustness(self) -> dict[str, Any]:
        """Rates when the scene is not as in training, without and with the patches."""
        frames = self._some(_ROBUST_FRAMES)
        angles = {f"turned {degrees:+d} degrees": degrees for degrees in (-15, 15)}
        alterations: dict[str, Alteration] = {
            "light -30 %": lambda pixels: misdetection.relight(pixels, 0.7),
            "light +30 %": lambda pixels: misdetection.relight(pixels, 1.3),
            "JPEG 50": lambda pixels: misdetection.recompress(pixels, 50),
            "half size": lambda pixels: misdetection.rescale(pixels, 0.5),
            "double size": lambda pixels: misdetection.rescale(pixels, 2.0),
        }
        scales = {"half size": 0.5, "double size": 2.0}
        factor = self.options.levels.scale_factors[0]
        rows: dict[str, Any] = {"num_frames": len(frames), "scale_factor": factor}
        for name, alter_fn in alterations.items():
            rows[name] = {
                variant: self._altered(frames, patches, alter_fn, scales.get(name, 1.0), factor)
                for variant, patches in (("clean", None), ("trained", self.patches))
            }
        for name, degrees in angles.items():
            turned = [_turned(frame, degrees) for frame in frames]
            rows[name] = {"trained": self._altered(turned, self.patches, np.asarray, 1.0, factor)}
        return rows

    def other_detectors(
        self, detectors: Mapping[str, other_detectors.Detector]
    ) -> dict[str, dict[str, Any]]:
        """Rates of detectors that the patches were not trained for."""
        frames = self._some(_OTHER_FRAMES)
        rows = {}
        for name, detect_fn in detectors.items():
            rows[name] = {}
            for variant, patches in (("clean", None), ("trained", self.patches)):
                misses = [
                    not misdetection.is_found(detect_fn(worn(frame, patches)), frame.placed.box)
                    for frame in frames
                ]
                rows[name][variant] = misdetection.rate(np.array(misses))
        return rows

    def transfer(self, frames: Sequence[Shown]) -> dict[str, Any]:
        """Rates on frames of somebody else."""
        some = _spread(frames, _TRANSFER_FRAMES)
        rows: dict[str, Any] = {"num_frames": len(some)}
        for variant, patches in (("clean", None), ("trained", self.patches)):
            rows[variant] = misdetection.summarise(self._judge(some, patches))
        return rows

    def ask_peer(self, python: pathlib.Path, script: pathlib.Path) -> dict[str, Any]:
        """Rates of PyPI `mtcnn` itself, run by a Python of its own, on written frames.

        It looks for faces of 20 px and more, or of 12 px where its pyramid would fail otherwise:
        "min_face_px" says which. Where it fails nevertheless there is its message and no rate.
        """
        frames = self._some(_PEER_FRAMES)
        rows: dict[str, Any] = {"num_frames": len(frames)}
        with reference.Peer(python, script) as other, tempfile.TemporaryDirectory() as folder:
            rows["versions"] = other.versions
            for variant, patches in (("clean", None), ("trained", self.patches)):
                paths = []
                for number, frame in enumerate(frames):
                    paths.append(pathlib.Path(folder) / f"{variant}_{number}.npy")
                    np.save(paths[-1], worn(frame, patches))
                rows[variant] = {}
                for factor in self.options.levels.scale_factors:
                    smallest = _peer_min_face(frames, factor)
                    options = detect.DetectorOptions(min_face_px=smallest, scale_factor=factor)
                    try:
                        _, found = other_detectors.ask_mtcnn(other, paths, options)
                    except reference.PeerError as error:
                        rows[variant][str(factor)] = {"failed": str(error)}
                        continue
                    misses = [
                        not misdetection.is_found(faces.boxes, frame.placed.box)
                        for faces, frame in zip(found, frames, strict=True)
                    ]
                    rows[variant][str(factor)] = {
                        **misdetection.rate(np.array(misses)), "min_face_px": smallest
                    }  # fmt: skip
        return rows

    def write_pictures(self, *, face_width_mm: float) -> dict[str, Any]:
        """Writes patches, frames, chart, contact sheet and film; returns where, and paper sizes."""
        areas = geometry.PLACEMENTS[self.options.placement]
        sizes = {
            name: geometry.paper_size(area, face_width_mm=face_width_mm)
            for name, area in areas.items()
        }
        files = {name: np.round(255 * self.patches[name]).astype(np.uint8) for name in areas}
        for name, patch in files.items():
            self._write(f"patches/{name}.png", _png(patch))
        note = f"{self.options.placement}, for a face {face_width_mm:.0f} mm wide"
        self._write("patches.pdf", print_sheet.pdf(files, sizes, note=note))
        kept = [frame for frame in self.frames if not frame.person.is_altered]
        pairs = [(worn(frame, None), worn(frame, self.patches)) for frame in kept]
        for frame, pair in zip(kept, pairs, strict=True):
            for kind, pixels in zip(("clean", "patched"), pair, strict=True):
                self._write(f"frames/{kind}/{frame.person.name}.png", _png(pixels))
        self._write("misdetection.png", self._chart())
        numbers = _numbers(len(kept), _FILM_FRAMES)
        shown = [self._annotated(kept[n], pairs[n]) for n in numbers]
        self._write("patched.gif", patches_pictures.film([patched for _, patched in shown]))
        rows = [
            [patches_pictures.close_up(one, kept[numbers[n]].placed.box) for one in shown[n]]
            for n in _numbers(len(shown), _SHEET_COLUMNS)
        ]
        columns = list(zip(*rows, strict=True))
        self._write("contact_sheet.png", patches_pictures.contact_sheet(columns, cell_px=240))
        return {"paper_mm": sizes, "face_width_mm": face_width_mm, "num_frames": len(kept)}

    def _variants(self) -> dict[str, Mapping[str, np.ndarray] | None]:
        low, high = self.options.ink
        generator = np.random.default_rng(1)
        noise = {
            name: generator.uniform(low, high, patch.shape).astype(np.float32)
            for name, patch in self.patches.items()
        }
        return {
            "trained": self.patches,
            "clean": None,
            "black": {name: np.full_like(patch, low) for name, patch in self.patches.items()},
            "white": {name: np.full_like(patch, high) for name, patch in self.patches.items()},
            "noise": noise,
            "untrained": self.start,
        }

    def _kept(self, name, frames, patches):
        path = self.work.path / "judged" / f"{name}.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            judged = {factor: np.array(rows, bool) for factor, rows in stored.items()}
            if all(rows.shape == (len(frames), 3) for rows in judged.values()):
                return judged
        except (OSError, ValueError):
            pass  # Not measured yet.
        judged = self._judge(frames, patches)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, judged)
        return judged

    def _judge(self, frames, patches) -> dict[str, np.ndarray]:
        levels = self.options.levels
        boxes = [frame.placed.box for frame in frames]
        pictures = [worn(frame, patches) for frame in frames]
        judged = {}
        for factor in progress.track(levels.scale_factors, description="scale factors"):
            judged[str(factor)] = misdetection.judge(
                self.variables, pictures, boxes,
                scale_factor=factor, min_face_px=levels.min_face_px,
            )  # fmt: skip
        return judged

    def _altered(self, frames, patches, alter_fn, scale, factor):
        pictures = [alter_fn(worn(frame, patches)) for frame in frames]
        boxes = [frame.placed.box * scale for frame in frames]
        found = misdetection.judge(self.variables, pictures, boxes, scale_factor=factor)
        return misdetection.rate(~found[:, -1])

    def _annotated(self, frame, pair):
        levels = self.options.levels
        options = detect.DetectorOptions(levels.min_face_px, levels.scale_factors[0])
        pictures = []
        for pixels in pair:
            boxes = detect.detect_faces(self.variables, pixels, options=options).boxes
            is_found = misdetection.is_found(boxes, frame.placed.box)
            pictures.append(
                patches_pictures.annotate(pixels, boxes, frame.placed.box, is_found=is_found)
            )
        return tuple(pictures)

    def _chart(self) -> bytes:
        table = {}
        for name in self._variants():
            path = self.work.path / "judged" / f"{name}.json"
            stored = json.loads(path.read_text(encoding="utf-8"))
            judged = {factor: np.array(rows, bool) for factor, rows in stored.items()}
            table[name] = misdetection.summarise(judged)
        count = min(self.num_controls, len(self.frames))
        title = f"MTCNN, {self.options.placement}: {len(self.frames)} frames, controls {count}"
        return patches_pictures.bar_chart(table, title=title)

    def _some(self, count):
        return _spread(self.frames, count)

    def _write(self, name: str, data: bytes) -> None:
        files.write_atomically(self.work.path / name, data, overwrite=True)


def worn(frame: Shown, patches: Mapping[str, np.ndarray] | None) -> np.ndarray:
    """A frame `[H, W, 3]` uint8 with patches on it, or without."""
    if patches is None:
        return frame.placed.pixels
    textures = placement.printed(patches, frame.placed.paper)
    return placement.draw(frame.placed.pixels, textures, frame.placed.grids)


def _peer_min_face(frames: Sequence[Shown], factor: float) -> float:
    """Smallest face that PyPI `mtcnn` can be asked for, of 20 and 12 px.

    The package counts its levels without regard to the smallest face, which at 20 px and most
    factors leaves a last level smaller than P-Net's field.
    """
    for frame in frames:
        side = min(frame.placed.pixels.shape[:2])
        count = round(-(np.log(side / 12) / np.log(factor) + 1))
        if int(side * 12 / 20 * factor ** (count - 1)) < 12:
            return 12.0
    return 20.0


def _turned(frame: Shown, degrees: float) -> Shown:
    angles = jnp.deg2rad(jnp.array([0.0, 0.0, float(degrees)]))
    grids = {
        name: np.asarray(warps.turn_grid(jnp.asarray(grid), angles))
        for name, grid in frame.placed.grids.items()
    }
    return frame._replace(placed=frame.placed._replace(grids=grids))


def _spread(frames, count):
    return [frames[number] for number in _numbers(len(frames), count)]


def _numbers(total: int, count: int) -> list[int]:
    return video.spread(total, min(total, count))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
