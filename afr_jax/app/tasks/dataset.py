"""Makes a data set unlearnable as `experiments.make_unlearnable` does, and tries its worth.

The small victims that are trained for that see the images as they are, the protected ones, and the
protected ones after what a victim may do against the noise.
"""

import io
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from afr_jax.app import archives, limits
from afr_jax.app.tasks import models, outputs, pictures
from afr_jax.core import files, interrupts, options, progress
from afr_jax.data import image_sets
from afr_jax.evaluation.attackers import victims
from afr_jax.evaluation.unlearnable import protect
from afr_jax.methods.unlearnable import recipes
from afr_jax.models.classifiers import registry

SIDES_PX = (32, 64, 128, 224)
_METHODS = ("lsp", "error_min")
_MOST_IMAGES = 5000
# Of the trial: images, share of them that victims are tested on, epochs, and steps of the search.
_TRIAL_IMAGES, _TEST_SHARE, _EPOCHS, _BATCH = 400, 0.25, 20, 32
_ROUNDS, _MOST_EXAMPLES, _EXAMPLE_PX = 8, 6, 160
_VICTIMS = (
    ("clean", "none", "the images as they are"),
    ("protected", "none", "the protected images"),
    ("protected", "grayscale", "the protected images, turned gray"),
    ("protected", "jpeg10", "the protected images, as JPEG of quality 10"),
)


def run(
    loaded: models.Models, folder: pathlib.Path, payload: Mapping[str, files.Json]
) -> dict[str, files.Json]:
    """Protects the images of a zip file.

    Args:
        loaded: its options.
        folder: for the images.
        payload: `zip`, its path; `method`, `side_px`, `tried`, whether victims are trained.

    Returns:
        Counts; `victims`, each with its accuracy in percent; `problems`; `outputs`.

    Raises:
        limits.Refused: the archive cannot be used.
    """
    if payload["method"] not in _METHODS or payload["side_px"] not in SIDES_PX:
        raise limits.Refused("there is no such choice")
    data, names = _read(pathlib.Path(payload["zip"]), folder, payload["side_px"])
    method = _method(payload["method"], len(data.labels), loaded.config.short)
    total = method.search_options().max_rounds if isinstance(method, recipes.SearchedNoise) else 1
    with progress.counter(total, description="rounds") as advance:

        def report(number: int, error: float) -> None:
            del number, error
            interrupts.check()
            advance(1)

        noise = recipes.make_unlearnable(
            data, config=method, seed=loaded.config.seed, report_fn=report
        )
    protected = noise.apply(data)
    change = np.abs(protected.images.astype(np.int16) - data.images).max(initial=0)
    tried = _try(loaded, data, protected) if payload["tried"] else []
    outputs.write_zip(folder / "protected.zip", _members(protected))
    found = {"zip": outputs.output("protected.zip")}
    found |= _write_examples(folder, data, protected)
    return {
        "method": payload["method"],
        "num_images": len(data.labels),
        "num_classes": len(data.classes),
        "side_px": payload["side_px"],
        "largest_change": int(change),
        "probe": protect.probe(noise, data),
        "victims": tried,
        "chance": round(100 / len(data.classes)),
        "num_problems": len(data.problems),
        "problems": [
            f"{names.get(each.name, each.name)}: {each.reason}" for each in data.problems[:20]
        ],
        "examples": sum(key.startswith("before_") for key in found),
        "outputs": found,
    }


def _read(
    archive: pathlib.Path, folder: pathlib.Path, side_px: int
) -> tuple[image_sets.ImageSet, dict[str, str]]:
    """The images of an archive under their names there, and those names by our own."""
    unpacked = archives.unpack_photos(archive, folder / "in", most=_MOST_IMAGES)
    by_class: dict[str, list[archives.Member]] = {}
    for member in unpacked.members:
        if len(member.parts) > 1:
            by_class.setdefault(member.parts[-2], []).append(member)
    if len(by_class) < 2:
        raise limits.Refused("the zip file must hold a folder of images for each of two classes")
    root, ids, names = folder / "data", {}, {}
    for index, label in enumerate(sorted(by_class)):
        own = root / f"{index:05d}"
        own.mkdir(parents=True)
        taken: list[str] = []
        for number, member in enumerate(by_class[label]):
            path = member.path.rename(own / f"{number:05d}{member.path.suffix}")
            stem = limits.unique_name(pathlib.PurePosixPath(member.parts[-1]).stem, taken)
            taken.append(stem)
            ids[f"{index:05d}/{path.stem}"] = f"{label}/{stem}"
            names[f"{index:05d}/{path.name}"] = f"{label}/{member.parts[-1]}"
    with options.usage(""):
        data = image_sets.load_image_folder(root, image_px=side_px, resize=True)
    labels = sorted(by_class)
    if len(data.classes) < 2:
        raise limits.Refused("fewer than two classes have an image that can be read")
    data = data._replace(
        sample_ids=tuple(ids[sample] for sample in data.sample_ids),
        classes=tuple(labels[int(name)] for name in data.classes),
    )
    return image_sets.take(data, np.arange(len(data.labels))), names


def _method(name: str, num_images: int, is_short: bool) -> recipes.NoiseConfig:
    if name == "lsp":
        return recipes.LSP()
    method = recipes.ErrorMin(network=registry.ClassifierOptions(architecture="small_resnet"))
    batch = min(_BATCH, num_images)
    changes = {"batch_size": batch, "max_rounds": _ROUNDS}
    return method.with_search(
        **changes | ({"max_rounds": 1, "num_steps": 2, "train_steps": 2} if is_short else {})
    )


def _try(
    loaded: models.Models, data: image_sets.ImageSet, protected: image_sets.ImageSet
) -> list[dict[str, files.Json]]:
    """Accuracy of small victims on clean images that none of them was trained on."""
    rows = image_sets.spread_rows(data.labels, _TRIAL_IMAGES, seed=loaded.config.seed)
    order = np.random.default_rng(loaded.config.seed).permutation(rows)
    cut = round(_TEST_SHARE * len(order))
    test, train = image_sets.take(data, order[:cut]), order[cut:]
    if cut < 2:
        return []
    is_short = loaded.config.short
    num_epochs = 1 if is_short else _EPOCHS
    sets = {"clean": image_sets.take(data, train), "protected": image_sets.take(protected, train)}
    found = []
    total = num_epochs * len(_VICTIMS)
    with progress.counter(total, description="trial") as advance:
        for name, countermeasure, words in _VICTIMS:
            victim = victims.train_victim(
                sets[name],
                test,
                options=victims.VictimOptions(
                    network=registry.ClassifierOptions(
                        architecture="small_resnet", width=4 if is_short else None
                    ),
                    num_epochs=num_epochs,
                    batch_size=_BATCH,
                    countermeasure=countermeasure,
                ),
                seed=loaded.config.seed,
                report_fn=lambda epoch, trained, tested: _step(advance),
            )
            found.append(
                {
                    "words": words,
                    "accuracy": round(100 * float(victim.curve.test_accuracy[-1])),
                    "num_test": cut,
                }
            )
    return found


def _step(advance: Callable[[int], object]) -> None:
    interrupts.check()
    advance(1)


def _members(protected: image_sets.ImageSet) -> Iterator[tuple[str, bytes]]:
    for sample, pixels in zip(protected.sample_ids, protected.images, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        yield f"{sample}.png", buffer.getvalue()


def _write_examples(
    folder: pathlib.Path, data: image_sets.ImageSet, protected: image_sets.ImageSet
) -> dict[str, files.Json]:
    found = {}
    rows = image_sets.spread_rows(data.labels, min(_MOST_EXAMPLES, len(data.labels)))
    for number, row in enumerate(rows):
        for key, images in (("before", data.images), ("after", protected.images)):
            factor = max(1, _EXAMPLE_PX // images.shape[1])
            pixels = np.kron(images[row], np.ones((factor, factor, 1), np.uint8))
            pictures.write_whole(folder / f"{key}_{number}.png", pixels, None)
            found[f"{key}_{number}"] = outputs.output(f"{key}_{number}.png")
    return found
