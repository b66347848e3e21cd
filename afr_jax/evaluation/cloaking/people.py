"""Who is protected, with which photos, and who else is enrolled, drawn from a folder of people.

The protocol of Shan et al. 2020, section 5: a protected person's photos are divided into those that
are published (cloaked, and enrolled by the tracker) and clean ones that the tracker is asked about.
Everybody else is enrolled clean.
"""

import pathlib
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import skimage.data
from PIL import Image

from afr_jax.data import identities


class ProtectedPerson(NamedTuple):
    """A protected person.

    Attributes:
        identity: name.
        published: photos that a tracker enrolls, cloaked or clean.
        probes: other photos, always clean.
    """

    identity: str
    published: tuple[identities.Sample, ...]
    probes: tuple[identities.Sample, ...]


class Split(NamedTuple):
    """All people of an evaluation.

    Attributes:
        protected: the people who are protected, sorted by name.
        gallery: photos of all others who are enrolled, sorted by id.
    """

    protected: tuple[ProtectedPerson, ...]
    gallery: tuple[identities.Sample, ...]

    @property
    def published(self) -> list[identities.Sample]:
        """Of all protected people, person by person."""
        return [sample for person in self.protected for sample in person.published]

    @property
    def probes(self) -> list[identities.Sample]:
        """Of all protected people, person by person."""
        return [sample for person in self.protected for sample in person.probes]

    @property
    def names(self) -> tuple[str, ...]:
        """Everybody's name, sorted; a label is an index into them."""
        names = {sample.identity for sample in self.gallery}
        return tuple(sorted(names | {person.identity for person in self.protected}))

    def labels(self, samples: list[identities.Sample]) -> np.ndarray:
        """`[N]` int labels of some samples."""
        index = {name: label for label, name in enumerate(self.names)}
        return np.array([index[sample.identity] for sample in samples], np.int64)


def choose(
    listing: identities.Listing,
    *,
    num_people: int,
    num_published: int,
    num_probes: int,
    num_gallery_people: int | None,
    num_gallery_photos: int,
    seed: int = 0,
    first: Mapping[str, str] | None = None,
    drawn_before: Collection[str] = (),
) -> Split:
    """Draws the people and their photos.

    Protected are people with `num_published` + `num_probes` photos or more; if they are too few,
    those with the most photos beside them, half of whose photos are published, or all but
    `num_probes` if that is more. The gallery prefers people with `num_gallery_photos` or more.

    Args:
        listing: everybody's photos.
        num_people: to protect.
        num_published: photos of each that are enrolled.
        num_probes: photos of each that are asked about.
        num_gallery_people: other people, enrolled clean; None for everybody.
        num_gallery_photos: photos of each, at most.
        seed: of the draw.
        first: ids of photos that are the first published ones of their people, by person; nobody
            else is protected. By default everybody may be, and the draw says which photo is first.
        drawn_before: names of people who are not protected; they may be enrolled.

    Raises:
        ValueError: there are not enough people, or not enough with two photos.
    """
    rng = np.random.default_rng(seed)
    members: dict[str, list[identities.Sample]] = {}
    for sample in listing.samples:
        members.setdefault(sample.identity, []).append(sample)
    names = [sorted(members)[i] for i in rng.permutation(len(members))]
    wanted = num_published + num_probes
    # A stable sort: the draw decides among those who have enough.
    names.sort(key=lambda name: -min(len(members[name]), wanted))
    there = {sample.sample_id for sample in listing.samples}
    candidates = [
        name
        for name in names
        if name not in drawn_before and (first is None or first.get(name) in there)
    ]
    chosen = candidates[:num_people]
    others = [name for name in names if name not in chosen]
    usable = sum(len(members[name]) >= 2 for name in candidates)
    if usable < num_people or len(others) < (num_gallery_people or 1):
        raise ValueError(
            f"{len(candidates)} people, {usable} of them with 2 photos or more; needed are "
            f"{num_people} such people to protect and {num_gallery_people or 1} others to enroll"
        )
    protected = []
    for name in sorted(chosen):
        photos = [members[name][i] for i in rng.permutation(len(members[name]))]
        if first is not None:  # A stable sort.
            photos.sort(key=lambda photo: photo.sample_id not in first.values())
        few = max(len(photos) // 2, len(photos) - num_probes)
        end = num_published if len(photos) >= wanted else few
        probes = photos[end : end + num_probes]
        protected.append(ProtectedPerson(name, tuple(photos[:end]), tuple(probes)))
    others.sort(key=lambda name: -min(len(members[name]), num_gallery_photos))
    gallery = []
    for name in sorted(others[:num_gallery_people]):
        order = rng.permutation(len(members[name]))[:num_gallery_photos]
        gallery += [members[name][i] for i in order]
    return Split(tuple(protected), tuple(sorted(gallery, key=lambda s: s.sample_id)))


def choose_readable(
    listing: identities.Listing,
    *,
    num_gallery_people: int | None,
    first: Mapping[str, str] | None = None,
    drawn_before: Collection[str] = (),
    **options: int,
) -> tuple[Split, identities.Listing]:
    """Draws the people and photos again until all photos of the draw can be read.

    Args:
        listing: everybody's photos.
        num_gallery_people: of `choose`.
        first: of `choose`.
        drawn_before: of `choose`.
        **options: of `choose`.

    Returns:
        The split, and the listing without the unreadable photos that were met, as problems.
    """
    while True:
        split = choose(
            listing,
            num_gallery_people=num_gallery_people,
            first=first,
            drawn_before=drawn_before,
            **options,
        )
        drawn = (*split.published, *split.probes, *split.gallery)
        problems = identities.without_unreadable(identities.Listing(drawn)).problems
        if not problems:
            return split, listing
        listing = listing.without(problems)


def write_synthetic(
    folder: pathlib.Path, *, num_people: int, num_photos: int, side: int = 160
) -> None:
    """Writes a folder of people for trying things out: the sample portrait in many colors.

    Args:
        folder: gets `person_NN/N.png`; files that are there stay.
        num_people: folders; people differ in color and every other one is mirrored.
        num_photos: of each; photos of a person differ in their crop.
        side: of the photos, pixels.
    """
    portrait = skimage.data.astronaut().astype(np.float32)
    for person in range(num_people):
        gains = 0.82 + 0.18 * np.cos(person + np.array([0.0, 2.0, 4.0]))
        for number in range(num_photos):
            path = folder / f"person_{person:02d}" / f"{number}.png"
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            low = 4 * number
            crop = np.clip(portrait[low : low + 280, 84 + low : 364 + low] * gains, 0, 255)
            crop = crop[:, ::-1] if person % 2 else crop
            Image.fromarray(crop.astype(np.uint8)).resize((side, side)).save(path)
