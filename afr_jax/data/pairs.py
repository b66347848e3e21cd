"""Pairs of photos for verification: from a CSV, or drawn from labels."""

import os

import numpy as np

from afr_jax.core import files


def read_pairs(table: str | os.PathLike[str]) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Reads a CSV with the columns image_a, image_b and same (0 or 1), UTF-8.

    Returns:
        The names of the photos of each pair, and `[N]` bool, whether they show one person.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such CSV; the message names the row (the header is row 1).
    """
    names, same = [], []
    for number, (first, second, kind) in files.read_csv(table, ("image_a", "image_b", "same")):
        if not first or not second or kind not in ("0", "1"):
            raise ValueError(f"{table}, row {number}: two photos and 0 or 1 are needed")
        names.append((first, second))
        same.append(kind == "1")
    return names, np.array(same, bool)


def balanced_pairs(
    labels: np.ndarray, *, max_pairs: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws as many pairs of one label as of two, no pair twice, the two kinds alternating.

    Args:
        labels: `[N]` int.
        max_pairs: how many pairs at most, of both kinds together.
        seed: of the draws.

    Returns:
        Rows `[M, 2]` int32 and `[M]` bool, whether they have one label. M is 0 where
        a kind of pairs does not exist.
    """
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    if len(labels) <= 512:
        first, second = np.triu_indices(len(labels), 1)
        order = generator.permutation(len(first))
        candidates = np.stack([first[order], second[order]], axis=1)
    else:
        # Half of the draws within a label, or pairs of one person would be rare among many.
        anywhere = generator.integers(len(labels), size=(4 * max_pairs, 2))
        by_label = np.argsort(labels, kind="stable")
        _, starts, counts = np.unique(labels[by_label], return_index=True, return_counts=True)
        place = generator.integers(len(counts), size=4 * max_pairs)
        offset = (generator.random((4 * max_pairs, 2)) * counts[place][:, None]).astype(int)
        within = by_label[starts[place][:, None] + offset]
        candidates = np.unique(np.sort(np.concatenate([anywhere, within]), axis=1), axis=0)
        candidates = generator.permutation(candidates[candidates[:, 0] != candidates[:, 1]])
    same = labels[candidates[:, 0]] == labels[candidates[:, 1]]
    of_one, of_two = (candidates[same == kind][: max_pairs // 2] for kind in (True, False))
    count = min(len(of_one), len(of_two))
    rows = np.stack([of_one[:count], of_two[:count]], axis=1).reshape(-1, 2)
    return rows.astype(np.int32), np.tile([True, False], count)
