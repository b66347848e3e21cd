"""The console command: `afr cloak --images=...` is `python -m experiments.cloak --images=...`.

Programs are found by name in `PROGRAMS` and imported when they are asked for; their flags are made
from their options as everywhere. `afr` alone lists them.
"""

import ast
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

# Name -> module, class of the options.
PROGRAMS = {
    "app": ("afr_jax.app.app_program", "AppConfig"),
    "attack_detector": ("afr_jax.evaluation.patches.study", "AttackConfig"),
    "benchmark": ("afr_jax.benchmark.program", "BenchmarkConfig"),
    "cloak": ("afr_jax.evaluation.cloaking.cloak_files", "CloakConfig"),
    "collect": ("afr_jax.recognition.tasks.collect_photos", "CollectConfig"),
    "detect": ("afr_jax.recognition.tasks.detect_photos", "DetectConfig"),
    "enroll": ("afr_jax.recognition.tasks.enroll_gallery", "EnrollConfig"),
    "face_coverage": ("afr_jax.evaluation.recognition.face_coverage", "FaceCoverageConfig"),
    "fawkes_evaluation": ("afr_jax.evaluation.cloaking.study", "FawkesEvaluationConfig"),
    "fetch_weights": ("afr_jax.recognition.tasks.fetch_weights", "FetchWeightsConfig"),
    "harden_extractor": (
        "afr_jax.evaluation.recognition.harden_extractor",
        "HardenExtractorConfig",
    ),
    "identify": ("afr_jax.evaluation.recognition.identify", "IdentifyConfig"),
    "make_unlearnable": ("afr_jax.evaluation.unlearnable.protect", "MakeUnlearnableConfig"),
    "match": ("afr_jax.recognition.tasks.match_queries", "MatchConfig"),
    "mode_sheet": ("afr_jax.evaluation.cloaking.mode_sheet", "ModeSheetConfig"),
    "patch_ablation": ("afr_jax.evaluation.patches.ablation", "AblationConfig"),
    "pubfig_study": ("afr_jax.evaluation.cloaking.pubfig_study", "PubFigConfig"),
    "sweep": ("afr_jax.core.runtime.sweep", "SweepConfig"),
    "train_extractor": ("afr_jax.evaluation.recognition.train_extractor", "TrainExtractorConfig"),
    "train_victim": ("afr_jax.evaluation.unlearnable.victim", "TrainVictimConfig"),
    "unlearnable_faces": ("afr_jax.evaluation.unlearnable.faces_study", "UnlearnableFacesConfig"),
    "unlearnable_study": ("afr_jax.evaluation.unlearnable.study", "UnlearnableStudyConfig"),
    "verify": ("afr_jax.evaluation.recognition.verify", "VerifyConfig"),
}


def main(*, argv: Sequence[str] | None = None) -> None:
    """Runs the program that the command line names, and exits with its code.

    Args:
        argv: the command line with the command's own name first; default `sys.argv`.
    """
    importlib.import_module("afr_jax.core.interrupts").end_at_once()
    _, *arguments = sys.argv if argv is None else argv
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "-help", "--help", "help"):
        print(listing())
        sys.exit(0)
    if name not in PROGRAMS:
        print(f"error: afr has no program {name!r}\n\n{listing()}", file=sys.stderr)
        sys.exit(2)
    module_name, config_name = PROGRAMS[name]
    # The record of a run says how it was called.
    sys.argv = list(arguments)
    module = importlib.import_module(module_name)
    program = importlib.import_module("afr_jax.core.program")
    program.main(getattr(module, config_name), module.run, argv=arguments)


def listing() -> str:
    """The programs with a line about each; nothing of them is imported for it."""
    lines = ["usage: afr PROGRAM [--FLAG=VALUE ...]; afr PROGRAM --help", ""]
    width = max(map(len, PROGRAMS))
    lines += [f"  {name:{width}}  {_summary(*target)}" for name, target in PROGRAMS.items()]
    return "\n".join(lines)


def _summary(module_name: str, config_name: str) -> str:
    """The first line of the docstring of a class, read from the source of its module."""
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"there is no {module_name}", name=module_name)
    tree = ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == config_name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise AttributeError(f"{module_name} has no {config_name}", name=config_name)


if __name__ == "__main__":
    main()
