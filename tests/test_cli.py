"""The console command: it knows every program of `experiments`, and runs it with its own flags."""

import ast
import importlib
import inspect
import json
import pathlib
import subprocess
import sys

import pytest

from afr_jax import cli
from afr_jax.core import options, program

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _targets(path):
    """Module and class of the options that a file of `experiments` hands to `program.main`."""
    tree = ast.parse(path.read_text())
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "program.main":
            config, run = (ast.unparse(argument).split(".") for argument in node.args)
            assert run == [config[0], "run"]
            yield modules[config[0]], config[1]


def test_the_command_knows_the_programs():
    files = [*(_ROOT / "experiments").glob("*.py"), *(_ROOT / "experiments/studies").glob("*.py")]
    assert cli.PROGRAMS == {
        path.stem: next(_targets(path), None) for path in files if path.stem != "__init__"
    }


@pytest.mark.parametrize("name", sorted(cli.PROGRAMS))
def test_every_program_has_options_and_a_summary(name):
    module_name, config_name = cli.PROGRAMS[name]
    module = importlib.import_module(module_name)
    config = getattr(module, config_name)
    assert issubclass(config, options.Config) and callable(module.run)
    (line,) = [row for row in cli.listing().splitlines() if row.startswith(f"  {name} ")]
    assert line.endswith(inspect.getdoc(config).splitlines()[0])
    text = program.help_text(config, name)
    assert len(text.splitlines()) <= 100, "two screens"


def _call(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(argv=["afr", *arguments])
    return end.value.code


def test_usage(capsys):
    assert _call() == 0
    assert "verify" in capsys.readouterr().out
    assert _call("paint") == 2
    assert "no program 'paint'" in capsys.readouterr().err
    assert _call("verify", "--help") == 0
    assert "--pair=" in capsys.readouterr().out


def test_a_program_is_run_with_its_flags():
    code = """
import sys
from afr_jax import cli
from afr_jax.evaluation.recognition import verify
from afr_jax.core import options
verify.run = lambda config: options.Outcome({"pair": config.pair, "seed": config.seed}, False)
cli.main(argv=["afr", "verify", "--pair=a,b", "--seed=3"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout) == {"pair": ["a", "b"], "seed": 3}


def test_the_list_comes_without_jax():
    code = (
        "import sys; from afr_jax import cli; print(cli.listing()); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True, capture_output=True)
