"""Two processes do what one does: programs that share their work, from the outside."""

import json
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import programs
import pytest
import skimage.data
from PIL import Image

from afr_jax.core import files
from afr_jax.core.runtime import claims

# What says how and when a result came about, and not what it is.
_CIRCUMSTANCES = {
    *("command", "commit", "config", "database", "date", "extractor", "host", "machine"),
    *("hardened", "matches", "num_devices", "output_dir", "seconds", "seconds_per_epoch"),
    *("settings", "workdir"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten photos, two of which show no face and are none; people; and images of three classes."""
    root = tmp_path_factory.mktemp("world")
    portrait = Image.fromarray(skimage.data.astronaut()[0:300, 80:380]).resize((128, 128))
    (root / "photos").mkdir()
    for number in range(8):
        portrait.rotate(number - 4).save(root / "photos" / f"{number}.png")
    programs.save_photo(root / "photos" / "8.png", (9, 9, 9))
    (root / "photos" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    for number, name in enumerate("aaabbbc"):
        (root / "people" / name).mkdir(parents=True, exist_ok=True)
        person = portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if name == "b" else portrait
        person.rotate(number).save(root / "people" / name / f"{number}.png")
    for name, seed in (("train", 0), ("test", 1)):
        programs.save_synthetic(root / name, 24, seed=seed, num_classes=3)
    return root


def _command(module, *flags, killed=()):
    """What starts a program; `killed` are arguments of `tests.killed`."""
    prefix = ["-m", "tests.killed", *map(str, killed)] if killed else ["-m"]
    return [sys.executable, *prefix, f"experiments.{module}", *map(str, flags)]


def _together(module, *flags):
    """Exit codes of two processes, and the result of the first."""
    ended = programs.run_together([_command(module, *flags)] * 2)
    lines = ended[0].stdout.splitlines()
    errors = "\n".join(one.stderr for one in ended)
    assert lines and not any(line.startswith("{") for line in ended[1].stdout.splitlines()), errors
    return [one.returncode for one in ended], json.loads(lines[-1])


def _plain(value):
    """A result without its circumstances."""
    if isinstance(value, dict):
        return {k: _plain(each) for k, each in value.items() if k not in _CIRCUMSTANCES}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _files(folder, *patterns):
    paths = sorted(path for pattern in patterns for path in folder.rglob(pattern))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _alone(monkeypatch, module, *flags, num_devices):
    """Result and exit code of one process, on so many devices."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(num_devices))
    done, result = programs.run(module, *flags)
    return result, done.returncode


class _Program(NamedTuple):
    """How a program is called here, and what of it is compared.

    Attributes:
        flags: without its folder; `{world}` stands for the fixture.
        place: flag of its folder.
        kinds: files there that are equal byte for byte.
        killed: when process 0 is killed, in words of `tests.killed`.
        num_devices: of one process that gives the same.
    """

    flags: tuple[str, ...]
    place: str
    kinds: tuple[str, ...]
    killed: tuple[str, int] = ("checkpoints/[0-9]+$", 2)
    num_devices: int = 2


_PROGRAMS = {
    "cloak": _Program(
        ("--images={world}/photos", "--surrogates=dlib", "--num_steps=2"),
        "output_dir",
        ("*.png", "report.json"),
        ("_cloaked.png$", 3),
        num_devices=1,
    ),
    "detect": _Program(
        ("--images={world}/photos", "--draw"),
        "output_dir",
        ("*.jpg", "faces.json"),
        ("_faces.jpg$", 3),
        num_devices=1,
    ),
    "make_unlearnable": _Program(("--toy", "--data={world}/train"), "output_dir", ("*.png",)),
    "train_extractor": _Program(("--toy",), "workdir", ("*.safetensors",)),
    "attack_detector": _Program(("--toy",), "workdir", ("patches/*.png", "frames/*/*")),
    "harden_extractor": _Program(("--toy",), "workdir", ("*.safetensors",)),
    "train_victim": _Program(
        ("--toy", "--data={world}/train", "--test_data={world}/test"), "workdir", ("curve.csv",)
    ),
}


@pytest.mark.parametrize(
    "module, is_killed",
    [
        ("cloak", True),
        *(
            pytest.param(module, True, marks=pytest.mark.slow)
            for module in list(_PROGRAMS)[1:]
            if module != "train_victim"
        ),
        *(pytest.param(module, False, marks=pytest.mark.slow) for module in _PROGRAMS),
    ],
)
def test_two_processes_equal_one_also_when_one_was_killed(
    world, tmp_path, monkeypatch, module, is_killed
):
    about = _PROGRAMS[module]
    flags = [flag.format(world=world) for flag in about.flags]
    one, two = f"--{about.place}={tmp_path / 'one'}", f"--{about.place}={tmp_path / 'two'}"
    if is_killed:
        killed = _command(module, *flags, two, killed=about.killed)
        ended = programs.run_together([killed, _command(module, *flags, two)])
        assert ended[0].returncode == -signal.SIGKILL and ended[1].returncode, ended
        assert not any("{" in one.stdout for one in ended)
    codes, shared = _together(module, *flags, two)
    result, code = _alone(monkeypatch, module, *flags, one, num_devices=about.num_devices)
    assert codes == [code, code] and _plain(shared) == _plain(result)
    assert _files(tmp_path / "one", *about.kinds) == _files(tmp_path / "two", *about.kinds) != {}


@pytest.mark.parametrize(
    "number, codes",
    [(signal.SIGTERM, [143, 143]), pytest.param(signal.SIGKILL, [1, -9], marks=pytest.mark.slow)],
)
def test_one_that_is_ended_ends_all_and_one_process_goes_on(
    world, tmp_path, monkeypatch, number, codes
):
    data = [f"--data={world / 'train'}", f"--test_data={world / 'test'}", "--toy"]
    flags = [*data, "--batch_size=12", "--epochs=12"]
    work = tmp_path / "work"

    def disturb(processes):
        while not (work / "metrics.jsonl").exists() and processes[1].poll() is None:
            time.sleep(0.05)
        processes[1].send_signal(number)

    command = _command("train_victim", *flags, f"--workdir={work}")
    ended = programs.run_together([command, command], disturb_fn=disturb)
    assert [one.returncode for one in ended] == codes, ended
    assert "process 1" in ended[0].stderr.splitlines()[-1]
    # As many devices in one process.
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    results = [
        programs.run("train_victim", *flags, f"--workdir={folder}")[1]
        for folder in (work, tmp_path / "undisturbed")
    ]
    assert _plain(results[0]) == _plain(results[1]) is not None


# Programs whose processes look at photos, or train victims, each its share, and process 0 goes on.
_SHARES = {
    "match": (("--queries={world}/many", "--database={world}/base"), ("*.csv",)),
    "enroll": (("--gallery={world}/people", "--database={folder}/base"), ()),
    "collect": (("--data={world}/people", "--max_distance=-1", "--output_dir={folder}"), ()),
    "identify": (("--data={world}/people", "--min_photos=2"), ()),
    "verify": (("--pairs={world}/pairs.csv", "--images={world}"), ("*.csv",)),
    "studies.unlearnable_study": (
        ("--toy", "--methods=random,error_min", "--granularities=class"),
        ("*.csv", "cells/*", "noise/*"),
    ),
    "unlearnable_faces": (("--toy",), ("cells/*",)),
    "fawkes_evaluation": (("--toy", "--methods=none,noise,fawkes"), ("*.csv",)),
}


# What processes leave for the first one.
_WAITS = r"(kept|cells)/.*\.(json|png)$"


@pytest.fixture(scope="module")
def many(world):
    """What `_SHARES` need besides: photos of several groups, pairs, a database."""
    for number in range(140):
        programs.save_photo(world / "many" / f"{number:03}.png", (number, 9, 9))
    for number in (3, 70, 135):
        portrait = (world / "photos" / f"{number % 8}.png").read_bytes()
        (world / "many" / f"{number:03}.png").write_bytes(portrait)
    names = [f"photos/{number}.png" for number in range(8)]
    rows = [(a, b, int(a < b)) for a in names[:4] for b in names[:6]]
    files.write_csv(world / "pairs.csv", ("image_a", "image_b", "same"), rows)
    programs.run("enroll", f"--gallery={world / 'people'}", f"--database={world / 'base'}")
    return world


@pytest.mark.parametrize(
    "module, is_killed",
    [
        ("match", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in _SHARES),
    ],
)
def test_what_is_looked_at_in_shares_is_the_same(many, tmp_path, monkeypatch, module, is_killed):
    flags, kinds = _SHARES[module]
    results = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        own = [flag.format(world=many, folder=folder) for flag in flags]
        own += [] if module == "collect" else [f"--workdir={folder / 'work'}"]
        if folder.name == "one":
            result, code = _alone(monkeypatch, module, *own, num_devices=1)
            codes = [code, code]
        else:
            if is_killed:
                killed = _command(module, *own, killed=(_WAITS, 1))
                ended = programs.run_together([killed, _command(module, *own)])
                assert ended[0].returncode == -signal.SIGKILL and ended[1].returncode, ended
            codes, result = _together(module, *own)
        results.append((codes, _plain(result)))
    assert results[0] == results[1]
    assert _files(tmp_path / "one", *kinds) == _files(tmp_path / "two", *kinds)
    if module == "enroll":  # What waited there has embeddings.
        assert not (tmp_path / "two" / "work" / "kept").exists()


def test_enrolling_processes_need_a_place_for_what_they_find(many, tmp_path):
    flags = [f"--gallery={many / 'people'}", f"--database={tmp_path / 'base'}"]
    ended = programs.run_together([_command("enroll", *flags)] * 2)
    assert [one.returncode for one in ended] == [2, 2]
    assert "--workdir is needed" in ended[0].stderr + ended[1].stderr
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("module", ["detect", pytest.param("cloak", marks=pytest.mark.slow)])
def test_runs_that_join_share_the_photos_and_outlive_one_another(
    world, tmp_path, monkeypatch, module
):
    """Small versions of `tests.drill.workers`."""
    about = _PROGRAMS[module]
    flags = [flag.format(world=world) for flag in about.flags]
    result, code = _alone(
        monkeypatch, module, *flags, f"--output_dir={tmp_path / module}-1", num_devices=1
    )
    folder = tmp_path / f"{module}-2"
    join = [*flags, f"--output_dir={folder}", "--join"]
    command = _command(module, *join, killed=about.killed)
    killed = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL and not killed.stdout, killed.stderr
    started = [
        subprocess.Popen(
            _command(module, *join), cwd=programs.ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [worker.communicate()[0] for worker in started]
    assert [worker.returncode for worker in started] == [code, code]
    assert [_plain(json.loads(each)) for each in said] == [_plain(result)] * 2
    assert _files(tmp_path / f"{module}-1", *about.kinds) == _files(folder, *about.kinds) != {}
    lines, _, _ = files.read_sealed_lines(folder / f".{module}" / claims.MANIFEST)
    done = [name for line in lines for name in line["items"]]
    assert len(done) == len(set(done)) == 10
    # Without --join nothing is left to do.
    again, _ = _alone(monkeypatch, module, *join[:-1], num_devices=1)
    assert _plain(again) == _plain(result)
