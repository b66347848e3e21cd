"""How much a victim learned: curves, last and peak accuracy, early stopping, separability of noise.

A victim that stops early can keep what it learned before the noise took over, so the peak of the
clean test accuracy is reported beside the last value. Everything is NumPy on the host.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn import linear_model

from afr_jax.core import files
from afr_jax.evaluation.metrics import intervals
from afr_jax.evaluation.report import figures


class Curve(NamedTuple):
    """A victim's training: accuracy in [0, 1] for each epoch, `[epochs]` float32.

    Attributes:
        train_accuracy: mean over the steps of the epoch, on what the victim was trained on.
        test_accuracy: on clean test images, after the epoch.
    """

    train_accuracy: np.ndarray
    test_accuracy: np.ndarray


class Summary(NamedTuple):
    """What a curve comes to.

    Attributes:
        last_accuracy: clean test accuracy after the last epoch.
        peak_accuracy: the largest of any epoch.
        peak_epoch: its number, from 1 on: where a victim with clean validation data stops.
        last_train_accuracy: on the training set, in the last epoch.
    """

    last_accuracy: float
    peak_accuracy: float
    peak_epoch: int
    last_train_accuracy: float


def summary(curve: Curve) -> Summary:
    """Last and peak accuracy of a finished curve; the first of equal peaks counts."""
    peak = int(np.argmax(curve.test_accuracy))
    return Summary(
        float(curve.test_accuracy[-1]),
        float(curve.test_accuracy[peak]),
        peak + 1,
        float(curve.train_accuracy[-1]),
    )


def interval(accuracy: float, num_images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy over so many test images."""
    return intervals.wilson_interval(round(accuracy * num_images), num_images)


def linear_probe(noise: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> float:
    """Held-out accuracy of a linear classifier that sees the noise alone.

    Yu et al. 2022 ("Availability Attacks Create Shortcuts"): what makes data unlearnable is close
    to linearly separable, so this is a cheap test of noise without training a victim. Ridge
    regression to one-hot labels on one half, accuracy on the other; chance for random noise.

    Args:
        noise: `[N, ...]`, of each sample.
        labels: `[N]`.
        seed: of the split.
    """
    flat = np.asarray(noise, np.float64).reshape(len(noise), -1)
    order = np.random.default_rng(seed).permutation(len(flat))
    fit, held = order[: len(order) // 2], order[len(order) // 2 :]
    center = flat[fit].mean(axis=0)
    scale = flat[fit].std() or 1.0
    known, unknown = (flat[fit] - center) / scale, (flat[held] - center) / scale
    classes = np.unique(labels)
    wanted = (labels[fit][:, None] == classes[None, :]) * 2.0 - 1.0
    # A tenth of the mean eigenvalue that is not zero for want of samples or features.
    penalty = 0.1 * np.sum(known**2) / min(known.shape) or 1.0
    ridge = linear_model.Ridge(penalty, fit_intercept=False, solver="cholesky")
    scores = ridge.fit(known, wanted).predict(unknown)
    return float(np.mean(classes[np.argmax(scores, axis=1)] == labels[held]))


def write_curves(path: str | os.PathLike[str], curves: Mapping[str, Curve]) -> None:
    """Writes a CSV with the columns run, epoch, train_accuracy, test_accuracy."""
    files.write_csv(
        path,
        ("run", "epoch", "train_accuracy", "test_accuracy"),
        [
            (name, epoch, *(f"{value:.6f}" for value in row))
            for name, curve in curves.items()
            for epoch, row in enumerate(zip(*curve, strict=True), start=1)
        ],
    )


def plot_curves(path: str | os.PathLike[str], curves: Mapping[str, Curve], *, title: str) -> None:
    """Draws clean test accuracy (solid) and training accuracy (dotted) by epoch."""
    pyplot = figures.pyplot()
    figure, axes = pyplot.subplots(figsize=(7.5, 4), layout="constrained")
    for name, curve in curves.items():
        epochs = np.arange(1, len(curve.test_accuracy) + 1)
        (line,) = axes.plot(epochs, 100 * curve.test_accuracy, label=name)
        axes.plot(epochs, 100 * curve.train_accuracy, ":", color=line.get_color(), linewidth=1)
    axes.set(xlabel="epoch", ylabel="accuracy, % (dotted: training)", ylim=(0, 101), title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figures.save(figure, path)


def plot_rocs(
    path: str | os.PathLike[str],
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
) -> None:
    """Draws ROC curves, (false, true acceptance rates) by name, over the diagonal of guessing."""
    pyplot = figures.pyplot()
    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for name, (far, tar) in lines.items():
        axes.plot(far, tar, label=name)
    axes.plot([0, 1], [0, 1], ":", color="gray", linewidth=1)
    axes.set(xlabel="false acceptance rate", ylabel="true acceptance rate", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figures.save(figure, path)


def plot_matrix(
    path: str | os.PathLike[str],
    values: np.ndarray,
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    title: str,
) -> None:
    """Draws a heat map of accuracies `[R, C]` in [0, 1] with their figures; NaN is "-"."""
    pyplot = figures.pyplot()
    # Room for the title above few columns.
    size = max(4.5, 1.6 + 0.75 * len(column_names)), 1.4 + 0.4 * len(row_names)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.imshow(100 * values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(column_names)), column_names, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(row_names)), row_names, fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        text = f"{100 * value:.0f}" if np.isfinite(value) else "-"
        color = "white" if value <= 0.6 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_title(title, fontsize=9)
    figures.save(figure, path)
