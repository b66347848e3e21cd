"""`experiments.extractor_agreement` as a program: what it refuses, and with which words."""

import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--peer_python is needed"),
        (["--networks=openface,nobody"], "'nobody' is none of facenet_vggface2"),
        (["--mobilefacenet=nowhere"], "there is no nowhere/mobilefacenet_y1_ms1m.json"),
        (["--peer_python=/no/python"], "/no/python cannot be started"),
    ],
)
def test_wrong_usage_is_named(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.extractor_agreement", f"--workdir={tmp_path}"]
        + arguments,
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and message in done.stderr
    assert not done.stdout and not (tmp_path / "result.json").exists()
