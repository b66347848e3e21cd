"""Tables of unlearnable examples: what victims know of clean images."""

from collections.abc import Mapping
from typing import Any

from docs.tools import markdown
from docs.tools.markdown import percent, percent_range, table

_NOISES = {
    "random": "random noise",
    "error_max": "error-maximizing",
    "error_min": "error-minimizing",
}
# Huang, Ma, Erfani, Bailey and Wang 2021, table 1: ResNet-18 on CIFAR-10.
_PUBLISHED = {
    "clean": "94.8 %",
    "error_min sample": "19.9 %",
    "error_min class": "16.4 %",
}


def _accuracies(name: str) -> Mapping[str, Mapping[str, Any]]:
    return {row["data"]: row for row in markdown.result(name)["rows"]}


def _accuracy(row: Mapping[str, Any]) -> str:
    last, best = row["last_accuracy"], percent(row["peak_accuracy"], digits=1)
    if row["seeds"] == 1:
        return f"{percent(last, digits=1)}; best {best}"
    return f"{percent_range(last, *row['last_spread'], digits=1)}; best {best}"


_MATRIX_ROWS = (
    "clean",
    *(
        f"{method} {granularity}"
        for method in ("error_min", "error_max", "random", "rem", "tap", "lsp", "aue", "aap")
        for granularity in ("sample", "class")
    ),
    *("cuda class", "uc class"),
    *(f"error_min {kind} {rate} %" for kind in ("sample", "class") for rate in (80, 60, 40, 20)),
)
# Architecture and countermeasure.
_MATRIX_COLUMNS = {
    ("small_resnet", "none"): "none",
    ("small_resnet", "jpeg10"): "JPEG 10",
    ("small_resnet", "grayscale"): "gray",
    ("small_resnet", "adversarial"): "adversarial",
    ("small_resnet", "purifier"): "purifier",
    ("small_resnet", "cutout"): "cutout",
    ("small_resnet", "mixup"): "mixup",
    ("small_resnet", "cutmix"): "cutmix",
    ("small_resnet", "jpeg50"): "JPEG 50",
    ("small_resnet", "jpeg75"): "JPEG 75",
    ("small_resnet", "blur"): "blur",
    ("small_resnet", "bit_depth"): "bit depth",
    ("small_resnet", "ueraser"): "UEraser",
    ("small_resnet", "randaugment"): "RandAugment",
    ("vgg11", "none"): "VGG-11",
    ("densenet121", "none"): "DenseNet-121",
}


@table("unlearnable_matrix", "unlearnable_matrix.json")
def unlearnable_matrix() -> str:
    """Noises by what victims of 1,000 images do about them."""
    return _matrix("unlearnable_matrix")


@table("unlearnable_matrix_5000", "unlearnable_matrix_5000.json")
def unlearnable_matrix_5000() -> str:
    """The paper's three noises by what victims of 5,000 images do about them."""
    return _matrix("unlearnable_matrix_5000")


def _matrix(name: str) -> str:
    """Noises by what victims do about them, in percent; "-" where nothing was measured."""
    rows = {
        (row["data"], row["architecture"], row["countermeasure"]): row
        for row in markdown.result(name)["rows"]
    }
    asked = {key[1:] for key in rows}
    columns = {column: title for column, title in _MATRIX_COLUMNS.items() if column in asked}
    lines = []
    for data in _MATRIX_ROWS:
        plain = rows.get((data, "small_resnet", "none"))
        if plain is None:
            continue
        cells = [_cell(rows.get((data, *column))) for column in columns]
        best = markdown.number(100 * plain["peak_accuracy"])
        lines.append([f"`{data}`", cells[0], best, *cells[1:]])
    first, *others = columns.values()
    head = ("noise", first, "best epoch", *others)
    return markdown.render(head, lines, right=len(head) - 1)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    values = [markdown.number(100 * v) for v in (row["last_accuracy"], *row["last_spread"])]
    return values[0] if row["seeds"] == 1 else f"{values[0]} ({values[1]}-{values[2]})"


@table("unlearnable_reduced", "unlearnable_reduced.json")
def unlearnable_reduced() -> str:
    """A small victim of a part of CIFAR-10."""
    rows = _accuracies("unlearnable_reduced")
    lines = [["clean data", _accuracy(rows["clean"]), _accuracy(rows["clean"])]]
    for noise, name in _NOISES.items():
        cells = [_accuracy(rows[f"{noise} {granularity}"]) for granularity in ("sample", "class")]
        lines.append([name, *cells])
    head = ("accuracy on clean test images", "noise by sample", "noise by class")
    return markdown.render(head, lines, right=2)


@table("unlearnable_cifar10", "unlearnable_cifar10.json")
def unlearnable_cifar10() -> str:
    """ResNet-18 on all of CIFAR-10."""
    rows = _accuracies("unlearnable_cifar10")
    names = {
        "clean": "clean data",
        "random sample": "random, by sample",
        "random class": "random, by class",
        "error_min sample": "error-minimizing, by sample",
        "error_min class": "error-minimizing, by class",
    }
    lines = [
        [
            text,
            percent(rows[name]["last_accuracy"], digits=1),
            percent(rows[name]["peak_accuracy"], digits=1),
            _PUBLISHED.get(name, ""),
        ]
        for name, text in names.items()
    ]
    head = ("noise", "last epoch", "best epoch", "published (Huang et al. 2021)")
    return markdown.render(head, lines, right=3)


@table("unlearnable_faces", "unlearnable_faces.json")
def unlearnable_faces() -> str:
    """The face study."""
    measured = markdown.result("unlearnable_faces")
    config = measured["config"]
    num_protected = config["num_protected"]
    num_others = config["people"] - config["num_auxiliary"] - num_protected
    names = {
        "clean": "nobody",
        "partial": f"the {num_protected}",
        "full": f"all {num_protected + num_others}",
    }
    lines = []
    for setting, name in names.items():
        row = measured["settings"][setting]
        accuracies = [
            _accuracy_range(row[key])
            for key in ("accuracy_of_protected_people", "accuracy_of_other_people")
        ]
        lines.append([name, *accuracies, _auc(row["auc"])])
    lines.append(["an untrained network", "", "", _auc(measured["untrained"]["auc"])])
    head = (
        "noise on",
        f"accuracy of the {num_protected} people",
        f"of the {num_others} others",
        "AUC of LFW pairs",
    )
    return markdown.render(head, lines, right=3)


@table("unlearnable_faces_people", "unlearnable_faces_people.json")
def unlearnable_faces_people() -> str:
    """The face study by the number of people, the victim's augmentation and the kind of noise."""
    lines = []
    for run in markdown.result("unlearnable_faces_people")["runs"]:
        config, settings = run["config"], run["settings"]
        people = config["people"] - config["num_auxiliary"]
        lines.append(
            [
                f"{people}, {config['num_protected']} protected",
                f"by {config['search']['granularity']}",
                "crops and flips" if config["victim"]["augmented"] else "none",
                _accuracy_range(settings["clean"]["accuracy_of_protected_people"]),
                _accuracy_range(settings["partial"]["accuracy_of_protected_people"]),
                *(_auc(settings[key]["auc"]) for key in ("clean", "full")),
                _auc(run["untrained"]["auc"]),
                _share(settings["full"]["share_of_trained_auc"]),
            ]
        )
    head = (
        *("victim's people", "noise", "victim's augmentation"),
        *("protected people, nobody protected", "these protected"),
        *("AUC, nobody protected", "all protected", "untrained", "left of training"),
    )
    return markdown.render(head, lines, right=6)


def _values(spread: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(spread[part] for part in ("mean", "low", "high"))


def _share(spread: Mapping[str, float]) -> str:
    """Shares that may be below 0."""
    mean, low, high = (markdown.number(100 * value) for value in _values(spread))
    return f"{mean} % ({low} to {high})"


def _accuracy_range(spread: Mapping[str, float]) -> str:
    return percent_range(*_values(spread))


def _auc(spread: Mapping[str, float]) -> str:
    mean, low, high = (markdown.number(spread[key], digits=3) for key in ("mean", "low", "high"))
    return f"{mean} ({low}-{high})"


@table(
    "unlearnable_speed",
    "unlearnable_speed_cpu.json",
    "unlearnable_speed_cpu_epyc.json",
    "unlearnable_speed_h200.json",
)
def unlearnable_speed() -> str:
    """The same algorithm beside plain PyTorch."""
    h200 = markdown.result("unlearnable_speed_h200")
    settings = {
        "small ResNet, Intel Xeon, batches of 128": markdown.result("unlearnable_speed_cpu"),
        "small ResNet, AMD EPYC, batches of 128": markdown.result("unlearnable_speed_cpu_epyc"),
        "ResNet-18, H200, bfloat16, batches of 512": h200["beside PyTorch"],
    }
    lines = []
    for name, measured in settings.items():
        for row in measured["rows"]:
            if row["peer"] is not None:
                cells = [markdown.spread(row[key]) for key in ("ours", "peer", "ratio")]
                lines.append([name, row["row"], *cells])
            if row["quantity"] == "share of the bare network":
                text = f"{percent(row['ours']['median'])} without BatchNorm, loss and optimizer"
                lines.append([name, row["row"], text, "", ""])
    for row in h200["without the peer"]["rows"]:
        if row["quantity"] == "share of peak":
            share = row["ours"]["median"] if isinstance(row["ours"], dict) else row["ours"]
            text = f"{percent(share)} of the peak"
            lines.append(["ResNet-18, H200, alone", row["row"], text, "", ""])
    return markdown.render(("setting", "what", "ours, s", "PyTorch, s", "ratio"), lines, right=3)
