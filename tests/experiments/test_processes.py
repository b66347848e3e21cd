"""Two processes do what one does: programs that share their work, from the outside."""

import json
import signal
import sys
import time

import programs
import pytest
import skimage.data
from PIL import Image

# What says how and when a result came about, and not what it is.
_CIRCUMSTANCES = {
    *("command", "commit", "config", "date", "host", "machine", "output_dir", "settings"),
    *("hardened", "num_devices", "seconds_per_epoch", "workdir"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten photos, two of which show no face and are none; and images of three classes."""
    root = tmp_path_factory.mktemp("world")
    portrait = Image.fromarray(skimage.data.astronaut()[0:300, 80:380]).resize((128, 128))
    (root / "photos").mkdir()
    for number in range(8):
        portrait.rotate(number - 4).save(root / "photos" / f"{number}.png")
    programs.save_photo(root / "photos" / "8.png", (9, 9, 9))
    (root / "photos" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    for name, seed in (("train", 0), ("test", 1)):
        programs.save_synthetic(root / name, 24, seed=seed, num_classes=3)
    return root


def _together(module, *flags):
    """Exit codes of two processes, and the result of the first."""
    command = [sys.executable, "-m", f"experiments.{module}", *map(str, flags)]
    ended = programs.run_together([command, command])
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


def test_cloak_and_detect_share_the_photos(world, tmp_path, monkeypatch):
    cloak = [f"--images={world / 'photos'}", "--surrogates=dlib", "--num_steps=2"]
    find = [f"--images={world / 'photos'}", "--draw"]
    for name, flags in (("cloak", cloak), ("detect", find)):
        one, two = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
        result, code = _alone(monkeypatch, name, *flags, f"--output_dir={one}", num_devices=1)
        assert code == 3
        codes, shared = _together(name, *flags, f"--output_dir={two}")
        assert codes == [3, 3] and _plain(shared) == _plain(result)
        kinds = "*.png", "*.jpg", "faces.json"
        assert _files(one, *kinds) == _files(two, *kinds)
    reports = [json.loads((tmp_path / f"cloak-{n}/report.json").read_text()) for n in (1, 2)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "module, kinds",
    [
        ("make_unlearnable", ("*.png",)),
        ("train_victim", ("curve.csv",)),
        pytest.param("harden_extractor", ("*.safetensors",), marks=pytest.mark.slow),
        pytest.param("attack_detector", ("patches/*.png", "frames/*/*"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_with_two_devices(world, tmp_path, monkeypatch, module, kinds):
    flags, place = ["--toy"], "workdir"
    if module in ("make_unlearnable", "train_victim"):
        flags.append(f"--data={world / 'train'}")
    if module == "train_victim":
        flags.append(f"--test_data={world / 'test'}")
    if module == "make_unlearnable":
        place = "output_dir"
    one, two = f"--{place}={tmp_path / 'one'}", f"--{place}={tmp_path / 'two'}"
    result, code = _alone(monkeypatch, module, *flags, one, num_devices=2)
    codes, shared = _together(module, *flags, two)
    assert codes == [code, code] and _plain(shared) == _plain(result)
    assert _files(tmp_path / "one", *kinds) == _files(tmp_path / "two", *kinds) != {}


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

    command = [sys.executable, "-m", "experiments.train_victim", *flags, f"--workdir={work}"]
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


def test_the_first_process_does_what_is_not_shared(world, tmp_path):
    flags = [f"--data={world / 'train'}", f"--output_dir={tmp_path}", "--max_distance=-1"]
    command = [sys.executable, "-m", "experiments.collect", *flags]
    ended = programs.run_together([command, command])
    assert [one.returncode for one in ended] == [0, 0], ended
    assert json.loads(ended[0].stdout)["photos"] == 24 and ended[1].stdout == ""
