"""Trains patches on a film of a person and measures them, as `experiments.attack_detector` does."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from afr_jax.app import limits
from afr_jax.app.tasks import models, outputs, pictures
from afr_jax.core import files, options
from afr_jax.data import video
from afr_jax.evaluation.patches import study
from afr_jax.methods.patches import geometry

# Frames that are taken of a film; of a single one the first part is trained on.
_FRAMES, _TRAINED_SHARE = 40, 0.6
# By what the page calls it: epochs, frames trained on, frames of the test, those of controls.
_LENGTHS = {"quick": (200, 10, 12, 4), "full": (2000, 20, 40, 12)}
_WORDS = {
    "clean": "no patch",
    "trained": "the trained patches",
    "black": "plain black paper",
    "white": "plain white paper",
    "noise": "random gray",
    "untrained": "the start, untrained",
}


def run(
    loaded: models.Models, folder: pathlib.Path, payload: Mapping[str, files.Json]
) -> dict[str, files.Json]:
    """Makes patches.

    Args:
        loaded: its options.
        folder: for everything.
        payload: `train` and perhaps `test`, each with `path`; `placement`, `length`,
            `face_width_mm`.

    Returns:
        `factors` and `rows` of the table of misdetection, `checks`, counts of frames; `outputs`.

    Raises:
        video.VideoError: a film cannot be read.
        options.UsageError: no face, or wrong choices.
    """
    if payload["placement"] not in geometry.PLACEMENTS or payload["length"] not in _LENGTHS:
        raise limits.Refused("there is no such choice")
    train = video.sample_film(payload["train"]["path"], _FRAMES)
    is_same_film = not payload.get("test")
    if is_same_film:
        cut = max(1, round(_TRAINED_SHARE * len(train)))
        train, test = train[:cut], train[cut:]
        if not test:
            raise limits.Refused("the film has one frame; a film of some seconds is needed")
    else:
        test = video.sample_film(payload["test"]["path"], _FRAMES)
    _save(folder / "train", train)
    _save(folder / "test", test)
    config = _config(loaded, folder, payload)
    with options.usage(""):
        result = study.run(config).result
    table = result["test"]["variants"]
    factors = [name for name, row in table["trained"].items() if isinstance(row, dict)]
    work = pathlib.Path("work")
    found = {
        "pdf": outputs.output(f"{work}/patches.pdf", name="patches.pdf"),
        "chart": outputs.output(f"{work}/misdetection.png", name="misdetection.png"),
        "clip": outputs.output(f"{work}/patched.gif", name="patched.gif"),
        "sheet": outputs.output(f"{work}/contact_sheet.png", name="contact_sheet.png"),
        "result": outputs.output(f"{work}/result.json", name="result.json"),
    }
    sizes = result["pictures"]["paper_mm"]
    for name in geometry.PLACEMENTS[payload["placement"]]:
        found[f"patch_{name}"] = outputs.output(f"{work}/patches/{name}.png")
    return {
        "factors": factors,
        "rows": [
            {"name": _WORDS.get(name, name), "cells": [_cell(row[factor]) for factor in factors]}
            for name, row in table.items()
        ],
        "checks": _checks(result),
        "patches": [
            {"key": f"patch_{name}", "name": name.replace("_", " "), "size": sizes.get(name)}
            for name in geometry.PLACEMENTS[payload["placement"]]
        ],
        "num_train": result["training"]["num_frames"],
        "num_test": result["test"]["num_frames"],
        "num_skipped": result["num_skipped"],
        "is_same_film": is_same_film,
        "is_short": loaded.config.short,
        "outputs": found,
    }


def _save(folder: pathlib.Path, frames: Sequence[video.Frame]) -> None:
    folder.mkdir()
    for number, frame in enumerate(frames):
        pictures.write_whole(folder / f"frame_{number:03d}.png", frame.pixels, None)


def _config(
    loaded: models.Models, folder: pathlib.Path, payload: Mapping[str, files.Json]
) -> study.AttackConfig:
    epochs, train_frames, test_frames, control_frames = _LENGTHS[payload["length"]]
    try:
        width = float(payload["face_width_mm"])
        config = study.AttackConfig(
            train=(str(folder / "train"),),
            test=(str(folder / "test"),),
            train_frames=train_frames,
            test_frames=test_frames,
            control_frames=control_frames,
            face_width_mm=width,
            workdir=str(folder / "work"),
            seed=loaded.config.seed,
        )
    except (TypeError, ValueError) as error:
        raise limits.Refused(f"the width of the face: {error}") from error
    patches = dataclasses.replace(config.patches, placement=payload["placement"], epochs=epochs)
    config = dataclasses.replace(config, patches=patches)
    return config.toy() if loaded.config.short else config


def _cell(row: Mapping[str, files.Json]) -> dict[str, files.Json]:
    rate = row["rate"]
    if rate is None:
        return {"rate": None, "low": None, "high": None}
    return {name: round(100 * row[name]) for name in ("rate", "low", "high")}


def _checks(result: Mapping[str, files.Json]) -> list[dict[str, files.Json]]:
    """Other light, sizes and detectors: what is missed without and with the patches."""
    tables = {**result.get("robustness", {}), **result.get("other_detectors", {})}
    return [
        {
            "name": name,
            "clean": _cell(row["clean"])["rate"] if "clean" in row else None,
            "trained": _cell(row["trained"])["rate"],
            "is_detector": name in result.get("other_detectors", {}),
        }
        for name, row in tables.items()
        if isinstance(row, dict) and "trained" in row
    ]
