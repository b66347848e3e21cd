"""Manifest, image and scripts for clusters: their schemas, linters and dry runs."""

import os
import pathlib
import shlex
import subprocess
import sys
import types

import jsonschema
import kubernetes_validate
import programs
import pytest
import yaml

from afr_jax import cli
from afr_jax.core import program
from launch import xm_launch

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LAUNCH = _ROOT / "launch"
_KUBERNETES = "1.33"

# What of a JobSet, jobset.x-k8s.io/v1alpha2, is not a Job: the fields of its API and their types.
_JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$", "maxLength": 40}},
        },
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": {"type": "array", "items": {"$ref": "#/$defs/rule"}},
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 0},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
    "$defs": {
        "rule": {
            "type": "object",
            "required": ["name", "action"],
            "additionalProperties": False,
            "properties": {
                "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:-]*[A-Za-z0-9_])?$", "maxLength": 128},
                "action": {
                    "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                },
                "onJobFailureReasons": {
                    "type": "array",
                    "items": {
                        "enum": [
                            "BackoffLimitExceeded",
                            "DeadlineExceeded",
                            "FailedIndexes",
                            "MaxFailedIndexesExceeded",
                            "PodFailurePolicy",
                        ]
                    },
                },
                "targetReplicatedJobs": {"type": "array", "items": {"type": "string"}},
            },
        }
    },
}


def _manifest():
    return yaml.safe_load((_LAUNCH / "gke" / "jobset.yaml").read_text())


def _job(manifest):
    template = manifest["spec"]["replicatedJobs"][0]["template"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "afr"}, **template}


def test_the_job_set_fits_its_schemas():
    manifest = _manifest()
    jsonschema.validate(manifest, _JOBSET)
    kubernetes_validate.validate(_job(manifest), _KUBERNETES, strict=True)


def test_the_schemas_see_what_is_wrong():
    manifest = _manifest()
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(manifest, _JOBSET)
    job = _job(_manifest())
    job["spec"]["template"]["spec"]["containers"][0]["arg"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, _KUBERNETES, strict=True)


def test_the_processes_of_the_job_set_find_each_other():
    manifest = _manifest()
    name, (workers,) = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    settings = {each["name"]: each["value"] for each in container["env"]}
    port = container["ports"][0]["containerPort"]
    assert settings["AFR_COORDINATOR"] == f"{name}-{workers['name']}-0-0.{name}:{port}"
    assert settings["AFR_NUM_PROCESSES"] == str(job["parallelism"]) == str(job["completions"])
    assert job["completionMode"] == "Indexed" and workers["replicas"] == 1
    # What is wrong or done is not tried again; 143, 134 and 1 are.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [program.EXIT_USAGE, program.EXIT_PARTIAL]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert not _refused(container["args"])


def _refused(words):
    """Whether a program takes its flags; `words` begin with its module."""
    module, config_name = cli.PROGRAMS[words[0].removeprefix("experiments.")]
    config_class = getattr(__import__(module, fromlist=[config_name]), config_name)
    return program.parse(config_class, words[1:]) is None


def _tool(name, *arguments):
    """Runs a linter that pip has put beside the interpreter."""
    path = pathlib.Path(sys.executable).with_name(name)
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_by_shellcheck():
    scripts = [*_LAUNCH.rglob("*.sh"), *_LAUNCH.rglob("*.sbatch"), _ROOT / ".ci" / "run"]
    assert len(scripts) == 5
    _tool("shellcheck", *map(str, scripts))


def test_the_image_by_hadolint():
    _tool("hadolint", str(_LAUNCH / "Containerfile"))


def test_what_the_image_copies_is_there():
    lines = (_LAUNCH / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((_ROOT / word).exists() for word in copied)


def _dry_run(script, *arguments, **settings):
    done = subprocess.run(
        [str(_LAUNCH / script), *arguments],
        env={"PATH": os.environ["PATH"], **settings},
        capture_output=True,
        text=True,
        timeout=20,
    )
    return done, [shlex.split(line) for line in done.stdout.splitlines()]


def test_xpk_is_given_the_program_and_the_slices():
    settings = {"AFR_CLUSTER": "tpus", "AFR_IMAGE": "there/afr:tpu", "AFR_SLICES": "2"}
    flags = ["experiments.train_extractor", "--data=/shared/my people", "--workdir=/shared/run1"]
    done, (words,) = _dry_run("gke/xpk.sh", "--dry_run", "run1", *flags, **settings, AFR_ZONE="z")
    assert done.returncode == 0 and words[:3] == ["xpk", "workload", "create"]
    given = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert {name: given[name] for name in ("cluster", "workload", "docker-image", "zone")} == {
        "cluster": "tpus",
        "workload": "run1",
        "docker-image": "there/afr:tpu",
        "zone": "z",
    }
    assert given["num-slices"] == "2" and "project" not in given
    assert shlex.split(given["command"]) == ["python", "-m", *flags]


def test_a_tpu_vm_is_set_up_and_given_the_program_on_all_hosts():
    settings = {"AFR_TPU": "my-tpu", "AFR_ZONE": "z", "AFR_PROJECT": "p"}
    flags = ["experiments.train_extractor", "--data=/shared/my people", "--workdir=/shared/run1"]
    done, (words,) = _dry_run("tpu_vm.sh", "--dry_run", *flags, **settings)
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-tpu", "--project=p", "--zone=z"]
    assert done.returncode == 0 and words[:-1] == [*ssh, "--worker=all"]
    command = shlex.split(words[-1].removeprefix("--command="))
    assert command == ["cd", "afr_jax", "&&", "python3", "-m", *flags]
    done, lines = _dry_run("tpu_vm.sh", "--dry_run", "--setup", **settings)
    assert done.returncode == 0
    assert [line[:1] + line[4:5] for line in lines] == [
        ["git", "--output=" + lines[1][5]],
        ["gcloud", "scp"],
        ["gcloud", "ssh"],
    ]
    assert "requirements.txt 'jax[tpu]'" in lines[2][-1]


@pytest.mark.parametrize(
    "script, arguments, settings",
    [
        ("gke/xpk.sh", ("--dry_run", "run1", "experiments.verify"), {"AFR_IMAGE": "image"}),
        ("gke/xpk.sh", ("run1",), {"AFR_IMAGE": "image", "AFR_CLUSTER": "tpus"}),
        ("gke/xpk.sh", ("--wet_run", "run1", "m"), {"AFR_IMAGE": "i", "AFR_CLUSTER": "tpus"}),
        ("tpu_vm.sh", ("experiments.verify",), {}),
        ("tpu_vm.sh", (), {"AFR_TPU": "tpu"}),
        ("tpu_vm.sh", ("--set_up",), {"AFR_TPU": "tpu"}),
    ],
)
def test_scripts_refuse_wrong_usage(script, arguments, settings):
    done, lines = _dry_run(script, *arguments, **settings)
    assert done.returncode == 2 and "usage:" in done.stderr and lines == []


class _Recorder(types.ModuleType):
    """Stands for a module of XManager: its functions note what they are called with."""

    def __init__(self, name):
        super().__init__(name)
        self.added, self.packaged = [], []

    def Job(self, executable, *, args, executor):
        return executable, list(args), executor

    def JobRequirements(self, **resources):
        return resources

    def container(self, spec, image_path):
        return spec, image_path

    def DockerOptions(self, *, volumes):
        return volumes

    class Local:
        Spec = staticmethod(lambda: "local")

        def __init__(self, **settings):
            self.settings = settings

    class Vertex(Local):
        Spec = staticmethod(lambda: "vertex")

    def create_experiment(self, *, experiment_title):
        self.title = experiment_title
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def package(self, packageables):
        self.packaged = packageables
        return ["executable"] * len(packageables)

    def add(self, job, *, identity):
        self.added.append((identity, job))


_SWEEP = ("--program=train_victim", "--arguments=--toy", "--axis=seed=0,1", "--axis=epochs=2,3")


@pytest.mark.parametrize("executor", ["local", "vertex"])
def test_xmanager_is_given_the_cells_of_the_sweep(tmp_path, monkeypatch, executor):
    recorder = _Recorder("xmanager")
    for name in ("xmanager", "xmanager.xm", "xmanager.xm_local"):
        monkeypatch.setitem(sys.modules, name, recorder)
    flags = [*_SWEEP, f"--workdir={tmp_path}", "--image=afr:cuda12", f"--executor={executor}"]
    flags += ["--accelerator=v100=8", "--volumes=/data"]
    result, complete = programs.call(xm_launch.LaunchConfig, xm_launch.run, *flags)
    assert complete and result == {"cells": 4, "launched": 4}
    assert recorder.packaged == [(executor, "afr:cuda12")]
    written = (tmp_path / "commands").read_text().splitlines()
    assert [shlex.join(job[1]) for _, job in recorder.added] == written
    assert [identity for identity, _ in recorder.added] == [f"cell-{n}" for n in range(4)]
    settings = recorder.added[0][1][2].settings
    assert settings["requirements"] == {"v100": 8}
    expected = {str(tmp_path): str(tmp_path), "/data": "/data"} if executor == "local" else None
    assert settings.get("docker_options") == expected


def test_xmanager_is_not_needed_to_see_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xmanager", None)
    flags = [*_SWEEP, f"--workdir={tmp_path / 'sweep'}", "--image=afr:cpu"]
    result, _ = programs.call(xm_launch.LaunchConfig, xm_launch.run, *flags, "--dry_run")
    assert result["launched"] == 0 and not (tmp_path / "sweep").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[3].endswith(
        f"--toy --seed=1 --epochs=3 --workdir={tmp_path / 'sweep'}/cells/3"
    )
    refused = programs.call(xm_launch.LaunchConfig, xm_launch.run, *flags)
    assert "pip install xmanager" in refused and not (tmp_path / "sweep").exists()
    for flag, message in (("--collect", "experiments.sweep"), ("--accelerator=8", "NAME=COUNT")):
        assert message in programs.call(xm_launch.LaunchConfig, xm_launch.run, *flags, flag)
    assert "--image" in programs.call(xm_launch.LaunchConfig, xm_launch.run, *flags[:-1])
