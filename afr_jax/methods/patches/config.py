"""The options of patches: where they are worn, how they are trained, on which random views."""

import dataclasses
from collections.abc import Sequence

from afr_jax.core import options
from afr_jax.methods.patches import geometry, scenes, views
from afr_jax.perturb import transformations

# Parts of the random views that can be switched off: name -> (field of the config, the fields of
# that and their neutral values).
PARTS: dict[str, tuple[str, dict[str, float | None]]] = {
    "light": ("views", {"light": 0.0}),
    "contrast": ("views", {"contrast": 0.0}),
    "color_cast": ("views", {"color_cast": 0.0}),
    "noise": ("views", {"noise": 0.0}),
    "blur": ("views", {"blur_px": 0.0}),
    "jpeg": ("views", {"jpeg_quality": None}),
    "turn": ("turns", {"turn_degrees": 0.0, "scale": 0.0, "shift": 0.0}),
    "print": ("turns", {"print_contrast": 0.0}),
    "scale": ("levels", {"scale_jitter": 0.0}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Where patches are worn and how they are trained.

    Attributes:
        placement: One of `geometry.PLACEMENTS`.
        patch_px: Rows of a patch; its columns follow from the shape of the paper.
        epochs: Steps of the training; each takes every photo once, in one random view.
        optimizer: "mi_fgsm" with the published schedule, or "adam".
        learning_rate: Of Adam, in [0, 1] units.
        loss: "l2" sums the squared excesses over the face's cells of a level, "max" takes the
            largest excess.
        margin: Face probability from which a cell costs, below the detector's threshold (0.6).
        tv_weight: Weight of total variation, the mean absolute difference of neighboring texels.
        black_weight: Weight of the mean squared distance from white.
        stage_weight: Weight of R-Net's and O-Net's face probability on squares about the face,
            which the paper does not use; 0 leaves them out.
        erased: Share of 6 x 6 blocks of each patch that are blank in a view, at random, so that no
            part of it counts on the others (after DePatch, Cheng et al. 2024).
        starts: Random starts that are trained side by side; the best is kept.
        ink: Darkest and lightest value of a texel, in [0, 1].
        levels: Pyramid levels that are drawn from.
        turns: How the worn patch moves.
        views: How the photo varies.
    """

    placement: str = options.option(
        "cheeks", "where patches are worn", choices=tuple(geometry.PLACEMENTS)
    )
    patch_px: int = options.option(48, "rows of texels of a patch", at_least=4)
    epochs: int = options.option(2000, "passes over the training frames", at_least=1)
    optimizer: str = options.option(
        "mi_fgsm",
        "steps: mi_fgsm with the published schedule, or adam",
        choices=("mi_fgsm", "adam"),
        aliases=("optimiser",),
    )
    learning_rate: float = options.option(0.06, "of adam, in [0, 1] units", at_least=0)
    loss: str = options.option(
        "l2", "sum of squares, or maximum, over cells", choices=("l2", "max")
    )
    margin: float = options.option(0.3, "face probability that begins to cost, below 1", at_least=0)
    tv_weight: float = options.option(0.1, "weight of total variation", at_least=0)
    black_weight: float = options.option(0.0, "weight of black area", at_least=0)
    stage_weight: float = options.option(
        20.0, "weight of R-Net and O-Net; 0: P-Net alone, as published", at_least=0
    )
    erased: float = options.option(
        0.0,
        "share of a patch's blocks that are blank in each view, at random",
        at_least=0,
        at_most=0.9,
    )
    starts: int = options.option(1, "random starts side by side; the best is kept", at_least=1)
    ink: tuple[float, float] = (0.05, 0.95)
    levels: scenes.LevelOptions = options.group(scenes.LevelOptions)
    turns: views.TurnOptions = views.TurnOptions()
    views: transformations.ViewOptions = transformations.ViewOptions()

    def __post_init__(self) -> None:
        """Checks ranges and choices.

        Raises:
            ValueError: An option is out of its range.
        """
        options.check(self)
        if not 0 <= self.ink[0] < self.ink[1] <= 1:
            raise ValueError(f"ink is {self.ink}, must rise within [0, 1]")
        if self.margin >= 1:
            raise ValueError(f"margin is {self.margin}, must lie in [0, 1)")

    def without(self, names: Sequence[str]) -> "PatchConfig":
        """The same without some parts of the random views.

        Args:
            names: Keys of `PARTS`.

        Raises:
            ValueError: There is no such part.
        """
        config = self
        for name in names:
            if name not in PARTS:
                known = ", ".join(PARTS)
                raise ValueError(f"there is no part {name!r} of the views, only {known}")
            field, changes = PARTS[name]
            part = dataclasses.replace(getattr(config, field), **changes)
            config = dataclasses.replace(config, **{field: part})
        return config

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each patch by its name: square texels on paper."""
        shapes = {}
        for name, area in geometry.PLACEMENTS[self.placement].items():
            height, width = geometry.paper_size(area)
            shapes[name] = (self.patch_px, round(self.patch_px * width / height))
        return shapes
