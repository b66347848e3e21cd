"""Anti-face-recognition in JAX: the public names, each loaded when it is first used.

import afr_jax as afr

fr = afr.load_recognizer("dlib")
cloaked = afr.cloak(fr, photos, config=afr.FawkesConfig(dssim_budget=0.007), key=0)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Type checkers and editors see the names where they are defined.
    from afr_jax.data.image_sets import load_image_folder as load_image_folder
    from afr_jax.data.noise_files import read_noise as read_noise
    from afr_jax.data.photos import read_photos as read_photos
    from afr_jax.data.video import read_frames as read_frames
    from afr_jax.evaluation.attackers.victims import (
        VictimOptions as VictimOptions,
    )
    from afr_jax.evaluation.attackers.victims import (
        train_victim as train_victim,
    )
    from afr_jax.evaluation.metrics.misdetection import misdetection as misdetection
    from afr_jax.evaluation.recognition.identify import identify as identify
    from afr_jax.methods.cloaking.face_filter import FaceFilter as FaceFilter
    from afr_jax.methods.cloaking.fawkes import FawkesConfig as FawkesConfig
    from afr_jax.methods.cloaking.workflow import cloak as cloak
    from afr_jax.methods.patches.config import PatchConfig as PatchConfig
    from afr_jax.methods.patches.training import train_patches as train_patches
    from afr_jax.methods.unlearnable.recipes import (
        AAP as AAP,
    )
    from afr_jax.methods.unlearnable.recipes import (
        AUE as AUE,
    )
    from afr_jax.methods.unlearnable.recipes import (
        CUDA as CUDA,
    )
    from afr_jax.methods.unlearnable.recipes import (
        LSP as LSP,
    )
    from afr_jax.methods.unlearnable.recipes import (
        REM as REM,
    )
    from afr_jax.methods.unlearnable.recipes import (
        TAP as TAP,
    )
    from afr_jax.methods.unlearnable.recipes import (
        ErrorMax as ErrorMax,
    )
    from afr_jax.methods.unlearnable.recipes import (
        ErrorMin as ErrorMin,
    )
    from afr_jax.methods.unlearnable.recipes import (
        RandomNoise as RandomNoise,
    )
    from afr_jax.methods.unlearnable.recipes import (
        UnlearnableClusters as UnlearnableClusters,
    )
    from afr_jax.methods.unlearnable.recipes import (
        make_unlearnable as make_unlearnable,
    )
    from afr_jax.models.classifiers.registry import ClassifierOptions as ClassifierOptions
    from afr_jax.recognition.detect import (
        DetectorOptions as DetectorOptions,
    )
    from afr_jax.recognition.detect import (
        detect_faces as detect_faces,
    )
    from afr_jax.recognition.pipeline import (
        Recognizer as Recognizer,
    )
    from afr_jax.recognition.pipeline import (
        load_recognizer as load_recognizer,
    )
    from afr_jax.recognition.pipeline import (
        recognize as recognize,
    )
    from afr_jax.recognition.pipeline import (
        verify as verify,
    )

_HOMES = {
    "afr_jax.data.image_sets": ("load_image_folder",),
    "afr_jax.data.noise_files": ("read_noise",),
    "afr_jax.data.photos": ("read_photos",),
    "afr_jax.data.video": ("read_frames",),
    "afr_jax.evaluation.attackers.victims": ("train_victim", "VictimOptions"),
    "afr_jax.evaluation.metrics.misdetection": ("misdetection",),
    "afr_jax.evaluation.recognition.identify": ("identify",),
    "afr_jax.methods.cloaking.face_filter": ("FaceFilter",),
    "afr_jax.methods.cloaking.fawkes": ("FawkesConfig",),
    "afr_jax.methods.cloaking.workflow": ("cloak",),
    "afr_jax.methods.patches.config": ("PatchConfig",),
    "afr_jax.methods.patches.training": ("train_patches",),
    "afr_jax.methods.unlearnable.recipes": (
        "make_unlearnable",
        "ErrorMin",
        "ErrorMax",
        "RandomNoise",
        "REM",
        "TAP",
        "LSP",
        "CUDA",
        "AUE",
        "AAP",
        "UnlearnableClusters",
    ),
    "afr_jax.models.classifiers.registry": ("ClassifierOptions",),
    "afr_jax.recognition.detect": ("detect_faces", "DetectorOptions"),
    "afr_jax.recognition.pipeline": ("load_recognizer", "recognize", "Recognizer", "verify"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
