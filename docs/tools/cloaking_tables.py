"""Tables of cloaking: who misses whom, against which tracker, at which budget."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from docs.tools import markdown
from docs.tools.markdown import percent, percents, table

_PAIRS = ("facenet_casia+mobilefacenet", "dlib+mobilefacenet", "dlib+facenet_casia")
_SURROGATES = (*_PAIRS, "dlib+facenet_casia+mobilefacenet")
_BUDGETS = (0.004, 0.007, 0.012)
UNSEEN = {
    "facenet_casia+mobilefacenet": "dlib",
    "dlib+mobilefacenet": "facenet_casia",
    "dlib+facenet_casia": "mobilefacenet",
}
_TRACKERS = tuple(markdown.EXTRACTORS)
_TRACKER_HEAD = ("made against", "DSSIM", *markdown.EXTRACTORS.values())
_COUNTERMEASURES = {
    "none": "as published (PNG)",
    "jpeg75": "JPEG 75",
    "jpeg50": "JPEG 50",
    "blur": "blur",
    "half_size": "half size",
    "grayscale": "grayscale",
    "denoise": "denoised",
}
# The surrogates of the default cloak, and the files of the people who were drawn later.
_DEFAULT = "dlib+sface"
_SECOND_DRAW, _LAST_DRAW = "protection_second_draw", "protection_third_draw"
_METHODS = {
    "noise": "noise",
    "fawkes": "ours",
    "lowkey": "LowKey",
    "fawkes_pypi": "PyPI `fawkes`",
    "first_search": "our first search",
}
_ON_FRONTIER = ("ssimulacra2", "lpips", "mean_dssim")


def missed(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> float:
    """The share of missed probes of the one row that has these values."""
    return float(found(rows, **wanted)["protection"])


def found(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    """The one row that has these values."""
    wanted = {"tracker": "nearest", "countermeasure": "none", **wanted}
    those = [row for row in rows if all(_same(row[key], wanted[key]) for key in wanted)]
    assert len(those) == 1, (wanted, len(those))
    return those[0]


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and value not in ("", None):
        return float(value) == wanted
    return value == wanted


def _png_and_jpeg(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> str:
    return percents(*(missed(rows, countermeasure=name, **wanted) for name in ("none", "jpeg75")))


def _trackers(rows: Sequence[Mapping[str, Any]], surrogates: str, **wanted: Any) -> Iterator[str]:
    """The cells of a row with all three trackers; those with no part in the cloak are bold."""
    for extractor in _TRACKERS:
        text = _png_and_jpeg(rows, surrogates=surrogates, extractor=extractor, **wanted)
        yield markdown.bold(text, extractor not in surrogates.split("+"))


@table("protection", "protection_lfw.json", "protection_low.json")
def protection() -> str:
    """Missed probes by surrogates, budget and tracker."""
    rows = markdown.result("protection_lfw")["table"]
    low = markdown.result("protection_low")["table"]
    lines = []
    for surrogates in _SURROGATES:
        for budget in _BUDGETS:
            cells = _trackers(rows, surrogates, method="fawkes", budget=budget)
            lines.append([markdown.extractors(surrogates), str(budget), *cells])
            if surrogates == _SURROGATES[-1] and budget == _BUDGETS[0]:
                cells = _trackers(low, surrogates, budget=budget, steps=200)
                lines.append([markdown.extractors(surrogates), f"{budget}, 200 steps", *cells])
    for method, budgets in (("noise", _BUDGETS), ("none", (None,))):
        for budget in budgets:
            cells = _trackers(rows, "", method=method, budget=budget)
            plain = [cell.strip("*") for cell in cells]
            name = "nobody: noise" if method == "noise" else "nobody: clean photos"
            lines.append([name, str(budget or "0"), *plain])
    return markdown.render(_TRACKER_HEAD, lines, right=3)


_MODES = ("low", "mid", "high")
_MODE_EXTRACTORS = {
    "dlib": "dlib",
    "sface": "SFace",
    "facenet_casia": "FaceNet CASIA",
    "mobilefacenet": "MobileFaceNet-y1",
    "mobilefacenet_192": "MobileFaceNet-192",
}
# Networks of one architecture, by the name of one of them.
_RELATIVES = {"mobilefacenet_192": "mobilefacenet"}
UNSEEN_BY_MODES = tuple(_MODE_EXTRACTORS)[2:]
_PLAIN_TRACKERS = {
    "nearest": "nearest neighbor",
    "nearest_threshold": "nearest neighbor below the threshold",
    "knn_vote": "vote of neighbors",
    "linear_head": "linear head",
}
_VISIBILITY = {
    "ssimulacra2": ("SSIMULACRA2", ".1f"),
    "ciede2000_mean": ("CIEDE2000, mean", ".2f"),
    "ciede2000_p99": ("CIEDE2000, 99 %", ".2f"),
    "chroma": ("tint, gray levels", ".2f"),
    "iris_chroma": ("tint of the irises", ".2f"),
    "flip": ("FLIP", ".3f"),
    "mean_dssim": ("DSSIM, mean", ".4f"),
}
# Measured later than the rest.
_SEEN = {**_VISIBILITY, "lpips": ("LPIPS", ".3f")}


@table("protection_modes", "protection_modes.json")
def protection_modes() -> str:
    """The default cloak by mode, tracker and extractor."""
    rows = markdown.result("protection_modes")["table"]
    lines = []
    for mode in _MODES:
        for tracker, name in _PLAIN_TRACKERS.items():
            cells = [
                markdown.bold(
                    _png_and_jpeg(
                        rows, method="fawkes", budget=mode, tracker=tracker, extractor=extractor
                    ),
                    extractor in UNSEEN_BY_MODES,
                )
                for extractor in _MODE_EXTRACTORS
            ]
            lines.append([f"`{mode}`", name, *cells])
    return markdown.render(("mode", "tracker", *_MODE_EXTRACTORS.values()), lines, right=5)


@table("protection_alignments", "protection_modes.json")
def protection_alignments() -> str:
    """The default cloak in mode mid by how trackers align and embed faces."""
    rows = markdown.result("protection_modes")["table"]
    there = {row["extractor"] for row in rows}
    lines = []
    for extractor, name in _MODE_EXTRACTORS.items():
        cells = [
            _png_and_jpeg(rows, method="fawkes", budget="mid", extractor=extractor + habit)
            if extractor + habit in there
            else ""
            for habit in ("", "@yunet", "@mirror", "@yunet@mirror")
        ]
        lines.append([name, *cells])
    head = ("extractor", "as usual", "by YuNet", "mirror images too", "both")
    return markdown.render(head, lines, right=4)


@table("visibility_modes", "protection_modes.json")
def visibility_modes() -> str:
    """What is seen of the default cloak."""
    rows = markdown.result("protection_modes")["table"]
    lines = []
    for mode in _MODES:
        row = next(row for row in rows if row["method"] == "fawkes" and row["budget"] == mode)
        lines.append([f"`{mode}`", *_seen(row)])
    heads = [name for name, _ in _VISIBILITY.values()]
    return markdown.render(("mode", *heads), lines, right=len(heads))


def _seen(row: Mapping[str, Any]) -> list[str]:
    """What is seen of a cell's photos, the medians."""
    return [f"{row[key]:{digits}}" for key, (_, digits) in _VISIBILITY.items()]


@table("protection_curve", "protection_curve.json")
def protection_curve() -> str:
    """Protection by DSSIM, without other limits."""
    rows = markdown.result("protection_curve")["table"]
    names = _asked(rows)
    cloaks = [row for row in rows if row["method"] == "fawkes"]
    lines = []
    for budget in sorted({row["budget"] for row in cloaks}):
        own = [row for row in cloaks if row["budget"] == budget]
        whole = {row["extractor"]: row for row in own if _is_nearest(row) and row["leak"] == 0}
        cells = [
            markdown.bold(
                markdown.percent_range(row["protection"], row["low"], row["high"]), row["transfer"]
            )
            for row in (whole[name] for name in names)
        ]
        seen = next(iter(whole.values()))["ssimulacra2"]
        lines.append([f"{budget:g}", *cells, f"{seen:.0f}"])
    head = ("DSSIM", *(_MODE_EXTRACTORS[name] for name in names), "SSIMULACRA2")
    return markdown.render(head, lines, right=len(names) + 1)


@table("protection_photos", "protection_photos.json")
def protection_photos() -> str:
    """Protection by the number of the person's photos that the tracker has."""
    rows = markdown.result("protection_photos")["table"]
    names = _asked(rows)
    kinds = ("nearest", "linear_head")
    lines = []
    mixes = {row["mix"]: tuple(map(int, row["mix"].split("+"))) for row in rows if row["mix"]}
    for mix in sorted(mixes, key=lambda mix: (mixes[mix][1] > 0, mixes[mix])):
        cloaked, clean = mix.split("+")
        cells = [
            markdown.bold(
                percents(
                    *(
                        missed(rows, method="fawkes", mix=mix, extractor=name, tracker=kind)
                        for kind in kinds
                    )
                ),
                name in UNSEEN_BY_MODES,
            )
            for name in names
        ]
        lines.append([cloaked, clean, *cells])
    head = ("cloaked", "clean", *(_MODE_EXTRACTORS[name] for name in names))
    return markdown.render(head, lines, right=len(names) + 2)


def _asked(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The extractors of some rows, in order."""
    return list(dict.fromkeys(row["extractor"] for row in rows))


def _is_nearest(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the nearest neighbor and of photos as they were published."""
    return row["tracker"] == "nearest" and row["countermeasure"] == "none"


@table("protection_one_extractor", "protection_low.json")
def protection_one_extractor() -> str:
    """Cloaks made against a single extractor."""
    rows = markdown.result("protection_low")["table"]
    lines = [
        [
            markdown.extractors(surrogates),
            f"{budget}, {steps} steps",
            *_trackers(rows, surrogates, budget=budget, steps=steps),
        ]
        for surrogates, budget, steps in (
            ("dlib", 0.004, 100),
            ("dlib", 0.007, 50),
            ("facenet_casia", 0.004, 100),
            ("mobilefacenet", 0.004, 100),
        )
    ]
    return markdown.render(_TRACKER_HEAD, lines, right=3)


@table("protection_methods", "protection_lfw.json", "protection_peers.json")
def protection_methods() -> str:
    """Other methods on the same photos."""
    ours = markdown.result("protection_lfw")["table"]
    others = markdown.result("protection_peers")["table"]
    lines = []
    for surrogates in _PAIRS:
        for name, method, rows in (("ours", "fawkes", ours), ("LowKey", "lowkey", others)):
            cells = _trackers(rows, surrogates, method=method, budget=0.007)
            lines.append([name, markdown.extractors(surrogates), *cells])
    cells = _trackers(others, "dlib", method="fawkes_pypi", budget=0.007)
    lines.append(["PyPI `fawkes`", "dlib", *cells])
    head = ("method", "made against", *markdown.EXTRACTORS.values())
    return markdown.render(head, lines, right=3)


@table("protection_second_draw", "protection_modes.json", "protection_second_draw.json")
def protection_second_draw() -> str:
    """The default cloak on two draws of people, with intervals."""
    draws = [markdown.result(name)["table"] for name in ("protection_modes", _SECOND_DRAW)]
    lines = []
    for mode in _MODES:
        for extractor, name in _MODE_EXTRACTORS.items():
            cells = []
            for tracker in ("nearest", "linear_head"):
                for rows in draws:
                    row = found(
                        rows,
                        method="fawkes",
                        surrogates=_DEFAULT,
                        budget=mode,
                        tracker=tracker,
                        extractor=extractor,
                        leak=0.0,
                    )
                    cells.append(markdown.percent_range(row["protection"], row["low"], row["high"]))
            lines.append([f"`{mode}`", markdown.bold(name, extractor in UNSEEN_BY_MODES), *cells])
    head = ("mode", "extractor", "nearest, first", "second", "linear head, first", "second")
    return markdown.render(head, lines, right=4)


@table("protection_third_draw", "protection_third_draw.json")
def protection_third_draw() -> str:
    """The default cloak on the people who were drawn last, with intervals."""
    rows = markdown.result(_LAST_DRAW)["table"]
    kinds = [("nearest", "none"), ("nearest", "jpeg75"), ("knn_vote", "none")]
    kinds += [("linear_head", "none"), ("linear_head", "jpeg75")]
    lines = []
    for mode, (extractor, name) in itertools.product(("low", "mid"), _MODE_EXTRACTORS.items()):
        cells = []
        for tracker, change in kinds:
            row = found(
                rows,
                method="fawkes",
                budget=mode,
                tracker=tracker,
                countermeasure=change,
                extractor=extractor,
            )
            cells.append(markdown.percent_range(row["protection"], row["low"], row["high"]))
        lines.append([f"`{mode}`", markdown.bold(name, extractor in UNSEEN_BY_MODES), *cells])
    names = ("nearest, PNG", "JPEG 75", "vote, PNG", "linear head, PNG", "JPEG 75")
    return markdown.render(("mode", "extractor", *names), lines, right=5)


@table("protection_frontier", "protection_frontier.json")
def protection_frontier() -> str:
    """What is seen and what unseen networks miss, by method and limits."""
    rows = markdown.result("protection_frontier")["table"]
    cells = dict.fromkeys((row["method"], row["surrogates"], row["budget"]) for row in rows)
    lines = []
    for method, surrogates, budget in cells:
        if budget is None:
            continue
        wanted = {"method": method, "surrogates": surrogates, "budget": budget}
        shares = [missed(rows, extractor=name, **wanted) for name in UNSEEN_BY_MODES]
        row = found(rows, extractor=UNSEEN_BY_MODES[0], **wanted)
        seen = [f"{row[key]:{_SEEN[key][1]}}" for key in _ON_FRONTIER]
        limits = f"`{budget}`" if budget in _MODES else f"DSSIM {budget}"
        lines.append([_METHODS.get(method, method), limits, *seen, *map(percent, shares)])
    heads = [_SEEN[key][0] for key in _ON_FRONTIER]
    names = [_MODE_EXTRACTORS[name] for name in UNSEEN_BY_MODES]
    return markdown.render(("method", "limits", *heads, *names), lines, right=6)


def unseen_at_mid() -> list[float]:
    """What the networks with no part in the default cloak miss of the people drawn last."""
    rows = markdown.result(_LAST_DRAW)["table"]
    return [
        missed(rows, method="fawkes", budget="mid", leak=0.0, extractor=name)
        for name in UNSEEN_BY_MODES
    ]


@table("protection_surrogates", "protection_surrogates.json")
def protection_surrogates() -> str:
    """Mode mid made against more networks: the nearest neighbor and a linear head."""
    rows = markdown.result("protection_surrogates")["table"]
    lines = [
        [_named(surrogates), *_nearest_and_linear(rows, surrogates=surrogates)]
        for surrogates in _surrogates(rows)
    ]
    return markdown.render(("made against", *_MODE_EXTRACTORS.values()), lines, right=5)


@table("protection_alignment", "protection_surrogates.json")
def protection_alignment() -> str:
    """The same, for trackers that cut faces out otherwise."""
    rows = markdown.result("protection_surrogates")["table"]
    trackers = list(dict.fromkeys(row["extractor"] for row in rows if "@" in row["extractor"]))
    lines = []
    for surrogates in _surrogates(rows):
        cells = []
        for extractor in trackers:
            text = _png_and_jpeg(rows, method="fawkes", surrogates=surrogates, extractor=extractor)
            name = extractor.split("@")[0]
            cells.append(markdown.bold(text, name in _unseen(surrogates)))
        lines.append([_named(surrogates), *cells])
    names = [f"{_MODE_EXTRACTORS[name]}, {how}" for name, how in map(_alignment, trackers)]
    return markdown.render(("made against", *names), lines, right=len(trackers))


def _surrogates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sets of surrogates of the rows, in order."""
    return list(dict.fromkeys(row["surrogates"] for row in rows if row["method"] == "fawkes"))


def _named(surrogates: str) -> str:
    return " + ".join(_MODE_EXTRACTORS[name] for name in surrogates.split("+"))


def _unseen(surrogates: str) -> set[str]:
    """The networks that neither the cloak nor a relative of theirs was made against."""
    seen = {_RELATIVES.get(name, name) for name in surrogates.split("+")}
    return {name for name in _MODE_EXTRACTORS if _RELATIVES.get(name, name) not in seen}


def _alignment(tracker: str) -> tuple[str, str]:
    """The network of a tracker such as `dlib@yunet@mirror`, and the rest in words."""
    name, *how = tracker.split("@")
    words = {"yunet": "aligned by YuNet", "mirror": "averaged with the mirror image"}
    return name, ", ".join(words[each] for each in how)


@table("protection_countermeasures", "protection_second_draw.json")
def protection_countermeasures() -> str:
    """What a tracker does to the published photos first."""
    rows = markdown.result(_SECOND_DRAW)["table"]
    lines = [
        [f"`{mode}`", name, *_nearest_and_linear(rows, budget=mode, countermeasure=key, leak=0.0)]
        for mode in _MODES
        for key, name in _COUNTERMEASURES.items()
    ]
    head = ("mode", "photos that the tracker enrolls", *_MODE_EXTRACTORS.values())
    return markdown.render(head, lines, right=5)


@table("protection_leaks", "protection_second_draw.json")
def protection_leaks() -> str:
    """What clean photos in the tracker's database cost."""
    rows = markdown.result(_SECOND_DRAW)["table"]
    shares = {
        0.0: "none",
        0.1: "every tenth: one photo of every other person",
        0.2: "every fifth: one of five",
        0.4: "two of five",
    }
    lines = [
        [f"`{mode}`", name, *_nearest_and_linear(rows, budget=mode, leak=leak)]
        for mode in _MODES
        for leak, name in shares.items()
    ]
    head = ("mode", "clean among the published", *_MODE_EXTRACTORS.values())
    return markdown.render(head, lines, right=5)


def _nearest_and_linear(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> list[str]:
    """The default cloak's cells for all extractors: the nearest neighbor / a linear head."""
    wanted = {"method": "fawkes", "surrogates": _DEFAULT, **wanted}
    return [
        markdown.bold(
            percents(
                *(
                    missed(rows, tracker=tracker, extractor=extractor, **wanted)
                    for tracker in ("nearest", "linear_head")
                )
            ),
            extractor in _unseen(wanted["surrogates"]),
        )
        for extractor in _MODE_EXTRACTORS
    ]


@table("protection_adaptive", "protection_second_draw.json")
def protection_adaptive() -> str:
    """A tracker that was trained on public cloaks of other people."""
    return _beside_dlib(_SECOND_DRAW, "adaptive_dlib", "adapted")


@table("protection_hardened", "protection_hardened.json")
def protection_hardened() -> str:
    """A tracker that was hardened without cloaks."""
    return _beside_dlib("protection_hardened", "hardened_dlib", "hardened")


def _beside_dlib(name: str, tuned: str, word: str) -> str:
    """The default cloak against dlib's net, and against one that was trained on from it."""
    rows = markdown.result(name)["table"]
    lines = []
    for mode in (*_MODES, None):
        wanted = {"method": "fawkes" if mode else "none", "budget": mode, "leak": 0.0}
        cells = [
            _png_and_jpeg(rows, extractor=extractor, tracker=tracker, **wanted)
            for tracker in ("nearest", "knn_vote", "linear_head")
            for extractor in ("dlib", tuned)
        ]
        lines.append([f"`{mode}`" if mode else "clean photos", *cells])
    kinds = ("nearest", "vote", "linear head")
    head = ("mode", *(f"{kind}, {net}" for kind in kinds for net in ("dlib", word)))
    return markdown.render(head, lines, right=6)


@table("hardening", "harden_dlib.json")
def hardening() -> str:
    """What hardening costs and brings."""
    stages = markdown.result("harden_dlib")["stages"]
    lines = [_hardening_row("dlib", stages[0]["before"])]
    for index, stage in enumerate(stages):
        lines.append(_hardening_row(f"after stage {index + 1}", stage["after"]))
    head = ("network", "accuracy on LFW pairs", "accuracy under attack", "attacked pairs")
    return markdown.render(head, lines, right=3)


def _hardening_row(name: str, measured: Mapping[str, Any]) -> list[str]:
    pairs = measured["verification"]
    return [
        name,
        percent(pairs["accuracy"], digits=1),
        percent(pairs["attacked_accuracy"]),
        str(pairs["attacked_pairs"]),
    ]


@table("cloak_20_faces", "cloak_20_faces.json")
def cloak_20_faces() -> str:
    """Cloaks of 20 aligned faces beside PyPI fawkes."""
    measured = markdown.result("cloak_20_faces")
    lines = [
        [
            name,
            markdown.number(row["mean"], digits=2),
            markdown.number(row["least"], digits=2),
            markdown.number(row["mean_dssim"], digits=4),
            markdown.number(row["largest_dssim"], digits=4),
        ]
        for name, row in (("ours", measured["ours"]), ("PyPI `fawkes`", measured["fawkes"]))
    ]
    head = ("method", "mean distance", "least distance", "mean DSSIM", "largest DSSIM")
    return markdown.render(head, lines, right=4)
