"""Tables of detector patches: in which share of frames the detector misses the face."""

from collections.abc import Mapping, Sequence
from typing import Any

from docs.tools import markdown
from docs.tools.markdown import number, percent, table

_FACTORS = ("0.709", "0.82", "0.9", "0.95")
_UPRIGHT = {
    "attack_cheeks": "man, cheeks",
    "attack_mask": "man, mask",
    "attack_cheeks_second_person": "woman, cheeks",
    "attack_cheeks_head_pose": "turned and tilted head, cheeks",
}
_POSES = {
    "attack_cheeks_turned": "turned head, cheeks",
    "attack_wide_cheeks_turned": "turned head, wide cheeks",
    "attack_cheeks_tilted": "tilted head, cheeks of the upright one",
}
_VARIANTS = {
    "trained": "trained patches",
    "clean": "nothing",
    "black": "plain black",
    "white": "white",
    "noise": "noise",
    "untrained": "untrained start",
}


def _over_factors(by_factor: Mapping[str, Any]) -> str:
    """Mean over the pyramid factors, range of the four, how far the intervals reach."""
    rows = [by_factor[factor] for factor in _FACTORS]
    rates = [100 * row["rate"] for row in rows]
    low, high = 100 * min(row["low"] for row in rows), 100 * max(row["high"] for row in rows)
    if max(rates) == 0:
        return f"0 % (up to {number(high)})"
    mean = percent(by_factor["mean"], digits=int(by_factor["mean"] < 0.01))
    factors = f"{number(min(rates))}-{number(max(rates))}"
    return f"{mean} ({factors}; {number(low)}-{number(high)})"


def _misses(files: Mapping[str, str]) -> str:
    found = {name: markdown.result(name) for name in files}
    lines = [
        ["epochs", *(f"{data['training']['epochs']:,}" for data in found.values())],
        ["one patch, mm", *(_paper(data["pictures"]["paper_mm"]) for data in found.values())],
        ["frames; with plain patches", *(_frames(data["test"]) for data in found.values())],
    ]
    for variant, name in _VARIANTS.items():
        cells = [_over_factors(data["test"]["variants"][variant]) for data in found.values()]
        lines.append([name, *cells])
    return markdown.render(("", *files.values()), lines)


def _paper(paper_mm: Mapping[str, Sequence[float]]) -> str:
    sizes = {tuple(round(side) for side in size) for size in paper_mm.values()}
    return ", ".join(f"{height} x {width}" for height, width in sorted(sizes))


def _frames(test: Mapping[str, Any]) -> str:
    return f"{test['num_frames']}; {test['num_control_frames']}"


@table("patches", *(f"{name}.json" for name in _UPRIGHT))
def patches() -> str:
    """Missed frames by person and placement."""
    return _misses(_UPRIGHT)


@table("patches_poses", *(f"{name}.json" for name in _POSES))
def patches_poses() -> str:
    """Missed frames of a head that turns and tilts."""
    return _misses(_POSES)


@table(
    "patches_package",
    "attack_cheeks.json",
    "attack_mask.json",
    "attack_cheeks_turned.json",
    "attack_wide_cheeks_turned.json",
)
def patches_package() -> str:
    """What the package `mtcnn` itself misses."""
    names = {**_UPRIGHT, **_POSES}
    lines = []
    for file in (
        "attack_cheeks",
        "attack_mask",
        "attack_cheeks_turned",
        "attack_wide_cheeks_turned",
    ):
        peer = markdown.result(file)["peer"]
        for variant in ("clean", "trained"):
            cells = [str(peer[variant][factor]["missed"]) for factor in _FACTORS]
            lines.append([names[file], _VARIANTS[variant], str(peer["num_frames"]), *cells])
    head = ("", "patches", "frames", *(f"factor {factor}" for factor in _FACTORS))
    return markdown.render(head, lines, right=5)


@table(
    "patches_views", "attack_cheeks.json", "attack_mask.json", "attack_cheeks_second_person.json"
)
def patches_views() -> str:
    """Missed frames under other light, turned, resized and compressed."""
    files = ("attack_cheeks", "attack_mask", "attack_cheeks_second_person")
    found = [markdown.result(name)["robustness"] for name in files]
    views = [key for key, value in found[0].items() if isinstance(value, Mapping)]
    lines = [
        [
            view,
            *(
                f"{data[view]['trained']['missed']} of {data[view]['trained']['total']}"
                for data in found
            ),
        ]
        for view in views
    ]
    return markdown.render(("view", *(_UPRIGHT[name] for name in files)), lines, right=3)


@table("patches_detectors", "attack_cheeks.json", "attack_mask.json")
def patches_detectors() -> str:
    """What other detectors miss."""
    names = {"lbp_cascade": "OpenCV's LBP cascade", "dlib_hog": "dlib's HOG detector"}
    lines = []
    for file in ("attack_cheeks", "attack_mask"):
        for detector, name in names.items():
            found = markdown.result(file)["other_detectors"][detector]
            for variant, row in found.items():
                lines.append(
                    [
                        _UPRIGHT[file],
                        name,
                        _VARIANTS.get(variant, variant),
                        f"{row['missed']} of {row['total']}",
                    ]
                )
    return markdown.render(("", "detector", "patches", "missed"), lines, right=1)


@table("patches_transfer", "attack_cheeks.json")
def patches_transfer() -> str:
    """Patches on a person whom they were not trained for."""
    lines = []
    for found in markdown.result("attack_cheeks")["transfer"].values():
        for variant in ("clean", "trained"):
            cells = [percent(found[variant][factor]["rate"]) for factor in _FACTORS]
            lines.append([_VARIANTS[variant], str(found["num_frames"]), *cells])
    head = ("patches of the man on the woman", "frames", *(f"factor {name}" for name in _FACTORS))
    return markdown.render(head, lines, right=5)


@table("patch_ablation", "patch_ablation.json")
def patch_ablation() -> str:
    """The method taken apart."""
    lines = []
    for name, row in markdown.result("patch_ablation")["rows"].items():
        interval = markdown.percent_range(row["rate"], row["low"], row["high"])
        gray = row.get("mean_grey", row.get("mean_gray"))
        lines.append(
            [
                {"clean": "no patch", "full": "all parts", "black": "plain black"}.get(
                    name, name.replace("colour_cast", "color cast")
                ),
                interval,
                "" if gray is None else number(gray, digits=2),
            ]
        )
    return markdown.render(("variant", "missed (95 % interval)", "mean gray"), lines, right=2)


@table("patches_erased", "patches_erased_turned.json", "patches_erased_tilted.json")
def patches_erased() -> str:
    """Blocks of the patches left blank in training, for heads that turn."""
    names = {
        "clean": "no patch",
        "full": "trained, nothing erased",
        "blocks erased 0.1": "trained with a tenth of the blocks erased",
        "blocks erased 0.3": "trained with three tenths erased",
        "black": "plain black",
    }
    found = [markdown.result(f"patches_erased_{head}")["rows"] for head in ("turned", "tilted")]
    lines = [
        [
            text,
            *(
                markdown.percent_range(rows[name]["rate"], rows[name]["low"], rows[name]["high"])
                for rows in found
            ),
        ]
        for name, text in names.items()
    ]
    head = ("missed (95 % interval)", "turned head", "tilted head, patches of the upright one")
    return markdown.render(head, lines, right=2)


@table("patch_speed", "patch_speed.json", "patch_starts_h200.json", "attack_cheeks.json")
def patch_speed() -> str:
    """Seconds an epoch."""
    lines = []
    for row in markdown.result("patch_speed")["rows"]:
        if row["quantity"] == "s per epoch":
            peer, ratio = (
                markdown.spread(row[key]) if row[key] else "" for key in ("peer", "ratio")
            )
            lines.append(
                [f"{row['row']}; one pair, CPU", markdown.spread(row["ours"]), peer, ratio]
            )
    seconds = markdown.result("attack_cheeks")["training"]["seconds_per_epoch"]
    lines.append(
        ["the 2,000 epochs of the first table; one pair, CPU", markdown.short(seconds), "", ""]
    )
    side = markdown.result("patch_starts_h200")
    seconds = markdown.short(side["seconds_per_epoch"])
    lines.append([f"{side['starts']} pairs side by side, H200", seconds, "", ""])
    head = ("s an epoch of 20 frames", "ours", "eager PyTorch", "ratio")
    return markdown.render(head, lines, right=3)


_PERSONS = {"man": "man", "woman": "woman", "second_man": "second man"}
_DETECTORS = {"yunet": "YuNet", "lbp_cascade": "LBP cascade", "dlib_hog": "dlib's HOG"}


@table("patches_persons", "attack_persons.json")
def patches_persons() -> str:
    """Missed frames of three people, by how the patches were trained and by detector."""
    runs = markdown.result("attack_persons")["runs"]
    others = [name for name in _DETECTORS if name in runs[0]["other_detectors"]]
    lines = []
    for person, label in _PERSONS.items():
        own = [run for run in runs if run["person"] == person]
        for variant, name in (("clean", "nothing"), ("black", "plain black")):
            lines.append([label, name, *_persons_cells(own[0], variant, others)])
        lines += [[label, _trained(run), *_persons_cells(run, "trained", others)] for run in own]
    head = ("person", "patches", *(f"factor {factor}" for factor in _FACTORS))
    head = (*head, *(_DETECTORS[name] for name in others))
    return markdown.render(head, lines, right=len(head) - 2)


def runs_of_others() -> list[Mapping[str, Any]]:
    """Runs of the people on whom no setting was chosen, trained on all three networks."""
    return [
        run
        for run in markdown.result("attack_persons")["runs"]
        if run["loss"] == "all three networks" and run["person"] != "man"
    ]


def _trained(run: Mapping[str, Any]) -> str:
    return f"trained on {run['loss']}"


def _persons_cells(run: Mapping[str, Any], variant: str, others: Sequence[str]) -> list[str]:
    rates = [run["test"]["variants"][variant][factor] for factor in _FACTORS]
    rates += [run["other_detectors"][name].get(variant) for name in others]
    return ["" if rate is None else _interval(rate) for rate in rates]


def _interval(rate: Mapping[str, float]) -> str:
    low, high = (number(100 * rate[end]) for end in ("low", "high"))
    return f"{percent(rate['rate'])} ({low}-{high})"


@table("patches_handling", "attack_persons.json")
def patches_handling() -> str:
    """Missed frames by how patches are worn and printed."""
    runs = [
        run
        for run in markdown.result("attack_persons")["runs"]
        if run["loss"] == "all three networks"
    ]
    lines = []
    for how, curve in runs[0]["handling"]["curves"].items():
        for index, point in enumerate(curve["points"]):
            found = [run["handling"]["curves"][how]["points"][index] for run in runs]
            lines.append([f"{how}: {point['at']:g} {curve['unit']}", *map(_count, found)])
    for name in runs[0]["handling"]["printers"]:
        found = [run["handling"]["printers"][name] for run in runs]
        lines.append([f"printed: {name}", *map(_count, found)])
    head = ("worn, printed", *(_PERSONS[run["person"]] for run in runs))
    return markdown.render(head, lines, right=len(runs))


def _count(rate: Mapping[str, float]) -> str:
    return f"{rate['missed']:g} of {rate['total']:g}"


@table("patches_survivors", "attack_persons.json")
def patches_survivors() -> str:
    """What P-Net still proposes of three people, without and with patches."""
    lines = []
    for run in markdown.result("attack_persons")["runs"]:
        for variant, name in (("clean", "nothing"), ("trained", _trained(run))):
            if variant == "clean" and run["loss"] != "all three networks":
                continue
            found = run["survivors"][variant]
            quartiles = [
                "" if found[key] is None else " / ".join(number(v, digits=2) for v in found[key])
                for key in ("sides", "away")
            ]
            share = f"{found['with_some']} of {found['frames']}"
            cells = (share, number(found["per_frame"], digits=1), *quartiles)
            lines.append([_PERSONS[run["person"]], name, *cells])
    head = (
        *("person", "patches", "frames with proposals", "a frame, median"),
        *("their sides, quartiles", "their distance, quartiles"),
    )
    return markdown.render(head, lines, right=4)
