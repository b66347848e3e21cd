"""Anti-face-recognition in JAX: the public names, each loaded when it is first used.

import afr_jax as afr

fr = afr.load_recognizer("dlib")
cloaked = afr.cloak(fr, photos, config=afr.FawkesConfig(dssim_budget=0.007), key=0)
"""

import importlib

_HOMES = {
    "afr_jax.data.image_sets": ("load_image_folder",),
    "afr_jax.data.noise_files": ("read_noise",),
    "afr_jax.data.photos": ("read_photos",),
    "afr_jax.data.video": ("read_frames",),
    "afr_jax.evaluation.attackers.victims": ("train_victim", "VictimOptions"),
    "afr_jax.evaluation.metrics.misdetection": ("misdetection",),
    "afr_jax.evaluation.recognition.identify": ("identify",),
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
