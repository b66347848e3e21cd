"""The record of how a result came about names no paths of this machine."""

import json
import pathlib

import pytest

from afr_jax.core import provenance

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "argument, shown",
    [
        (
            "--images=/data/shared/wider,/data/shared/lfw",
            "--images=$AFR_SHARED/wider,$AFR_SHARED/lfw",
        ),
        ("--images=/data/shared2/my photos", "--images='/data/shared2/my photos'"),
        ("--images=/data/shared/my photos", "--images=$AFR_SHARED'/my photos'"),
        ("--weights=a=/data/shared/w.npz,b=c", "--weights=a=$AFR_SHARED/w.npz,b=c"),
        ("--reference_python=/opt/p/bin/python", "--reference_python=$REFERENCE_PYTHON"),
        ("--workdir=out", "--workdir=$WORKDIR"),
        ("out", "$WORKDIR"),
        ("--output_dir=output", "--output_dir=output"),
        ("--toy", "--toy"),
    ],
)
def test_provenance_puts_names_for_paths_of_this_machine(argument, shown):
    names = {
        "AFR_SHARED": "/data/shared/",
        "REFERENCE_PYTHON": "/opt/p/bin/python",
        "WORKDIR": "out",
    }
    record = provenance.provenance("experiments.benchmark", [argument], names={**names, "NO": None})
    assert record["command"] == f"python -m experiments.benchmark {shown}"
    assert record["machine"]["cores"] >= 1 and record["machine"]["backend"] == "cpu"
    assert str(_ROOT) not in json.dumps(record)
