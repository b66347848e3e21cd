"""The table of published claims beside our figures, with a verdict that a rule gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from docs.tools import cloaking_tables as cloaking
from docs.tools import markdown
from docs.tools import patch_tables as patches
from docs.tools.markdown import number, percent, table

# Of 5 points, and what floats add.
_CLOSE, _HALF = 0.05 + 1e-9, 0.5
_SOURCES = (
    *("protection_lfw.json", "protection_lfw.csv", "protection_low.json"),
    *("protection_end_to_end.json", "protection_second_draw.json", "fawkes_attempts.json"),
    "protection_third_draw.json",
    *("attack_persons.json", "attack_mask.json", "patch_ablation.json"),
    *("unlearnable_cifar10.json", "unlearnable_faces.json"),
)


class _Figures(NamedTuple):
    """A published figure, what it would be without the method, and ours; shares or areas."""

    published: float
    without: float
    ours: float


class _Claim(NamedTuple):
    """A row: what was claimed, what ours was measured on, its file, and the figures."""

    claim: str
    setting: str | Callable[[], str]
    source: str
    figures_fn: Callable[[], _Figures]
    is_area: bool = False


@table("reproduction", *_SOURCES, has_source_line=False)
def reproduction() -> str:
    """Published claims, our figures, and verdicts."""
    lines = []
    for claim in _CLAIMS:
        figures = claim.figures_fn()
        show_fn = _area if claim.is_area else percent
        lines.append(
            [
                claim.claim,
                claim.setting if isinstance(claim.setting, str) else claim.setting(),
                show_fn(figures.published),
                show_fn(figures.ours),
                verdict(*figures),
                f"[{claim.source}](../experiments/results/{claim.source})",
            ]
        )
    head = ("claim", "ours measured on", "published", "ours", "verdict", "file")
    return markdown.render(head, lines)


def verdict(published: float, without: float, ours: float) -> str:
    """Whether a claim was reproduced.

    Args:
        published: the figure.
        without: the same without the method, so that what it does is the difference.
        ours: our figure.
    """
    share = (ours - without) / (published - without)
    if abs(ours - published) <= _CLOSE or share >= 1:
        return "reproduced"
    return "in kind" if share >= _HALF else "**not reproduced**"


def _area(value: float) -> str:
    return number(value, digits=2)


def _table(name: str) -> Sequence[Mapping[str, Any]]:
    return markdown.result(name)["table"]


def _seen(surrogates: str, **wanted: Any) -> list[float]:
    """Missed by each extractor that had a part in the cloak, PNG and nearest neighbor."""
    rows = _table("protection_lfw")
    return [
        cloaking.missed(rows, method="fawkes", surrogates=surrogates, extractor=name, **wanted)
        for name in surrogates.split("+")
    ]


def _unseen(**wanted: Any) -> list[float]:
    """Missed by each extractor that had no part in a cloak against the two others."""
    rows = markdown.records("protection_lfw")
    wanted = {"method": "fawkes", "budget": 0.007, "leak": "0", **wanted}
    return [
        cloaking.missed(rows, surrogates=surrogates, extractor=unseen, **wanted)
        for surrogates, unseen in cloaking.UNSEEN.items()
    ]


def _same_extractor() -> _Figures:
    seen = [rate for pair in cloaking.UNSEEN for rate in _seen(pair, budget=0.007)]
    return _Figures(1.0, 0.0, min(seen))


def _ordinary_surrogate() -> _Figures:
    rows = _table("protection_low")
    cells = [
        cloaking.missed(rows, surrogates="dlib", budget=0.007, extractor=name)
        for name in ("facenet_casia", "mobilefacenet")
    ]
    return _Figures(0.2, 0.0, min(cells))


def _hardened_surrogate() -> _Figures:
    name = "centroid, dlib hardened at 3/255 in place of dlib"
    (found,) = (
        row for row in markdown.result("fawkes_attempts")["attempts"] if row["attempt"] == name
    )
    return _Figures(0.95, 0.0, found["missed"]["png"])


def _modes() -> _Figures:
    return _Figures(0.95, 0.0, min(cloaking.unseen_at_mid()))


def _end_to_end() -> _Figures:
    (found,) = (
        row["protection"]
        for row in _table("protection_end_to_end")
        if row["method"] == "fawkes"
        and row["tracker"] == "end_to_end"
        and row["countermeasure"] == "none"
    )
    return _Figures(1.0, 0.0, found)


def _few_clean() -> _Figures:
    return _Figures(0.8, 0.0, min(_unseen(leak="0.1")))


def _more_clean() -> _Figures:
    """A loss: without clean photos nearly all probes are missed."""
    return _Figures(0.4, 1.0, max(_unseen(leak="0.25")))


def _purified() -> _Figures:
    kept = [
        after / before
        for name in ("jpeg50", "blur")
        for after, before in zip(_unseen(countermeasure=name), _unseen(), strict=True)
    ]
    return _Figures(1.0, 0.0, min(kept))


def _adapted() -> _Figures:
    rows = _table("protection_second_draw")
    wanted = {"method": "fawkes", "surrogates": "dlib+sface", "budget": "mid", "leak": 0.0}
    before, after = (
        cloaking.missed(rows, extractor=each, **wanted) for each in ("dlib", "adaptive_dlib")
    )
    return _Figures(0.03, before, after)


def _cheeks() -> _Figures:
    rates = [run["test"]["variants"]["trained"]["mean"] for run in patches.runs_of_others()]
    return _Figures(0.9, 0.2, sum(rates) / len(rates))


def _mask() -> _Figures:
    variants = markdown.result("attack_mask")["test"]["variants"]
    return _Figures(0.8, 0.2, variants["trained"]["mean"])


def _p_net_alone() -> _Figures:
    rows = markdown.result("patch_ablation")["rows"]
    return _Figures(0.9, 0.2, rows["P-Net alone"]["rate"])


def _accuracy(data: str, key: str = "last_accuracy") -> float:
    (found,) = (
        row[key] for row in markdown.result("unlearnable_cifar10")["rows"] if row["data"] == data
    )
    return found


def _face_setting() -> str:
    measured = markdown.result("unlearnable_faces")
    known = measured["settings"]["clean"]["accuracy_of_protected_people"]["mean"]
    of_them = measured["config"]["num_protected"]
    return f"{of_them} of {_face_people(measured)}; {percent(known)} unprotected"


def _area_setting() -> str:
    measured = markdown.result("unlearnable_faces")
    clean, floor = (
        _area(spread["auc"]["mean"])
        for spread in (measured["settings"]["clean"], measured["untrained"])
    )
    return f"{_face_people(measured)}; {clean} clean, {floor} untrained"


def _face_people(measured: Mapping[str, Any]) -> str:
    config = measured["config"]
    people = config["people"] - config["num_auxiliary"]
    return f"{people} people at {config['image_px']} px, {len(measured['seeds'])} seeds"


def _faces(key: str, setting: str) -> float:
    return markdown.result("unlearnable_faces")["settings"][setting][key]["mean"]


def _protected_people() -> _Figures:
    key = "accuracy_of_protected_people"
    return _Figures(0.16, _faces(key, "clean"), _faces(key, "partial"))


def _other_people() -> _Figures:
    key = "accuracy_of_other_people"
    return _Figures(_faces(key, "clean"), 0.0, _faces(key, "partial"))


_CLAIMS = (
    _Claim(
        "Fawkes: user and tracker have one extractor, DSSIM above 0.005",
        "DSSIM 0.007, worst of six",
        "protection_lfw.json",
        _same_extractor,
    ),
    _Claim(
        "Fawkes: another extractor, ordinary surrogate, worst pair",
        "dlib alone, DSSIM 0.007",
        "protection_low.json",
        _ordinary_surrogate,
    ),
    _Claim(
        "Fawkes: another extractor, hardened surrogate, every pair",
        "hardened dlib + FaceNet, DSSIM 0.007, MobileFaceNet",
        "fawkes_attempts.json",
        _hardened_surrogate,
    ),
    _Claim(
        "the same, by other means",
        "the default cloak, mode mid (DSSIM 0.015), worst of three",
        "protection_third_draw.json",
        _modes,
    ),
    _Claim(
        "Fawkes: the tracker trains its network on the cloaks",
        "the default cloak, mode mid, MobileFaceNet trained on from its weights",
        "protection_end_to_end.json",
        _end_to_end,
    ),
    _Claim(
        "Fawkes (abstract): the tracker has some clean photos as well",
        "every tenth clean, DSSIM 0.007, worst of three unseen",
        "protection_lfw.csv",
        _few_clean,
    ),
    _Claim(
        "Fawkes (figure): above 15 % clean photos little is left",
        "every fourth clean, best of three unseen",
        "protection_lfw.csv",
        _more_clean,
    ),
    _Claim(
        "Fawkes: JPEG and blur do not help the tracker (share of the protection kept)",
        "JPEG 50 and blur, worst of three unseen",
        "protection_lfw.csv",
        _purified,
    ),
    _Claim(
        "Radiya-Dixit et al.: a tracker tuned on public cloaks undoes them",
        "dlib tuned on 145 cloaks, mode mid",
        "protection_second_draw.json",
        _adapted,
    ),
    _Claim(
        "MTCNN patches: frames missed, cheeks (0.2 without)",
        "two people on whom nothing was chosen, mean of the factors 0.709, 0.82, 0.9, 0.95",
        "attack_persons.json",
        _cheeks,
    ),
    _Claim(
        "MTCNN patches: frames missed, mask (0.2 without)",
        "another clip, on which settings were chosen, mean of the same factors",
        "attack_mask.json",
        _mask,
    ),
    _Claim(
        "MTCNN patches: the loss on P-Net alone is enough",
        "80 epochs, factor 0.82, the other networks not attacked",
        "patch_ablation.json",
        _p_net_alone,
    ),
    _Claim(
        "Unlearnable: accuracy on clean CIFAR-10",
        "ResNet-18, 60 epochs, one seed",
        "unlearnable_cifar10.json",
        lambda: _Figures(0.9477, 0.1, _accuracy("clean")),
    ),
    _Claim(
        "Unlearnable: error-minimizing noise by sample",
        "the same, last epoch",
        "unlearnable_cifar10.json",
        lambda: _Figures(0.1993, _accuracy("clean"), _accuracy("error_min sample")),
    ),
    _Claim(
        "Unlearnable: at no epoch above 23 %",
        "the same, best epoch",
        "unlearnable_cifar10.json",
        lambda: _Figures(0.23, _accuracy("clean"), _accuracy("error_min sample", "peak_accuracy")),
    ),
    _Claim(
        "Unlearnable: error-minimizing noise by class",
        "the same, last epoch",
        "unlearnable_cifar10.json",
        lambda: _Figures(0.1642, _accuracy("clean"), _accuracy("error_min class")),
    ),
    _Claim(
        "Unlearnable faces: accuracy on the protected people",
        _face_setting,
        "unlearnable_faces.json",
        _protected_people,
    ),
    _Claim(
        "Unlearnable faces: the other people are learned as before",
        "the other people of the same; beside what clean training gives them",
        "unlearnable_faces.json",
        _other_people,
    ),
    _Claim(
        "Unlearnable faces: AUC where all people are protected (0.9975 clean)",
        _area_setting,
        "unlearnable_faces.json",
        lambda: _Figures(0.5321, _faces("auc", "clean"), _faces("auc", "full")),
        is_area=True,
    ),
)
