"""The chips of a hardening run: photos aligned for an extractor, with cloaked versions if wanted.

What can go wrong with the user's data raises ValueError with a message for people.
"""

import collections
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from afr_jax.data import identities, photos
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import chips


def list_photos(roots: Sequence[str], *, max_photos: int = 0) -> identities.Listing:
    """The photos of some folders of identities; names are paths below "0", "1" and so on.

    Args:
        roots: folders, see `identities.list_tree`.
        max_photos: of an identity of a folder, its first by name; 0 takes all.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: it is no folder, or holds no photo in a folder.
    """
    samples, problems = [], []
    for number, root in enumerate(roots):
        listing = identities.list_tree(root)
        counts: dict[str, int] = {}
        for sample in listing.samples:
            counts[sample.identity] = counts.get(sample.identity, 0) + 1
            if not max_photos or counts[sample.identity] <= max_photos:
                name = f"{number}/{sample.sample_id}"
                samples.append(identities.Sample(name, sample.identity, sample.path))
        problems += [
            identities.Omission(f"{number}/{item.name}", item.reason) for item in listing.problems
        ]
    return identities.Listing(tuple(sorted(samples, key=lambda s: s.sample_id)), tuple(problems))


def read_chips(
    detector: mtcnn.Variables,
    extractor: registry.Extractor,
    listing: identities.Listing,
    *,
    cloaks: Sequence[str] = (),
    report_fn: Callable[[int], None] | None = None,
) -> tuple[identities.Listing, np.ndarray]:
    """Detects the main face of every photo and aligns it for an extractor.

    A cloaked photo is aligned by the landmarks of the clean one, so that their chips differ by the
    cloak alone.

    Args:
        detector: variables of MTCNN's networks.
        extractor: whose chips, of side S.
        listing: of `list_photos`; of anything, without cloaks.
        cloaks: folders of cloaked photos; below each the version of `<folder>/<stem>.<suffix>` is
            `<folder>/<stem>_cloaked.png` or .jpg (as `experiments.cloak` writes it) or has the same
            name.
        report_fn: called with the number of photos that were handled since (progress).

    Returns:
        The listing without the photos that cannot be used, which become problems, and the chips of
        the others, `[N, 1 + len(cloaks), S, S, 3]` uint8, clean ones first.

    Raises:
        ValueError: no photo is left.
    """
    stems = collections.Counter(_stem(sample) for sample in listing.samples)

    def cut(sample: identities.Sample, pixels: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        versions = [pixels]
        if cloaks and stems[_stem(sample)] > 1:
            raise ValueError("differs in its suffix alone from another one: whose cloak is it?")
        for root in cloaks:
            versions.append(photos.read_photo(_cloaked(pathlib.Path(root), sample)).pixels)
            if versions[-1].shape != pixels.shape:
                raise ValueError(f"its cloaked version in {root} has another size")
        return np.stack([chips.extractor_chip(extractor, one, landmarks) for one in versions])

    return chips.cut_faces(detector, listing, cut, report_fn=report_fn)


def _stem(sample: identities.Sample) -> str:
    return sample.sample_id.rpartition(".")[0]


def _cloaked(root: pathlib.Path, sample: identities.Sample) -> pathlib.Path:
    place = root.joinpath(*sample.sample_id.split("/")[1:])
    found = [
        place.with_name(f"{place.stem}{identities.CLOAKED}{suffix}") for suffix in (".png", ".jpg")
    ]
    found += [place, place.with_suffix(".png")]
    for path in found:
        if path.is_file():
            return path
    raise ValueError(f"has no cloaked version in {root}")
