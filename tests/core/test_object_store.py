import pathlib
import shutil

import pytest
from etils import epath

from afr_jax.core import distributed, options, program, workdir
from afr_jax.core.runtime import object_store
from afr_jax.recognition.tasks import detect_photos


def _names(address):
    return {
        path.relative_to(epath.Path(address)).as_posix()
        for path in object_store._files(epath.Path(address))
    }


def test_a_run_finds_in_the_store_what_an_earlier_one_has_left(bucket):
    address = f"{bucket}/run"
    work = workdir.open_workdir(address, {"a": 1})
    assert not work.resumed and object_store.is_address(address)
    (work.path / "checkpoints" / "3" / "default").mkdir(parents=True)
    (work.path / "checkpoints" / "3" / "default" / "d").write_bytes(b"1" * 5_000_000)
    (work.path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    (work.path / "checkpoints" / "4.orbax-checkpoint-tmp" / "d").touch()
    work.append_metrics({"step": 1})
    work.write_result({"plot": work.path / "a.png"})
    object_store.close_all()
    assert not work.path.exists()
    left = {"config.json", "metrics.jsonl", "result.json", "checkpoints/3/default/d"}
    assert _names(address) == left
    again = workdir.open_workdir(address, {"a": 1})
    assert again.resumed and again.read_metrics() == [{"step": 1}]
    assert (again.path / "checkpoints/3/default/d").read_bytes() == b"1" * 5_000_000
    assert f"{address}/a.png" in (again.path / "result.json").read_text()
    (again.path / "checkpoints/3/default/d").unlink()
    again.append_metrics({"step": 2})
    object_store.close_all()
    assert _names(address) == left - {"checkpoints/3/default/d"}
    assert (epath.Path(address) / "metrics.jsonl").read_text().count("step") == 2
    with pytest.raises(options.UsageError, match=f"^{address} holds a run .*a .was 1, is 2"):
        workdir.open_workdir(address, {"a": 2})
    object_store.close_all()


def test_checkpoints_come_last_and_whole(bucket, monkeypatch):
    work = workdir.open_workdir(f"{bucket}/run", {})
    step = work.path / "checkpoints" / "7"
    put, brought = object_store.Mirror._put, []

    def put_and_drop(mirror, name):
        brought.append(name)
        shutil.rmtree(step, ignore_errors=True)  # As a run does that is faster than its store.
        return put(mirror, name)

    monkeypatch.setattr(object_store.Mirror, "_put", put_and_drop)
    names = ("_CHECKPOINT_METADATA", "checksums.json", "d/a")
    with object_store._open[0]._pushing:  # Of the thread.
        for path in (*(step / name for name in names), work.path / "kept/x", work.path / "z"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    object_store._open[0].push()
    order = ["checksums.json", "d/a", "_CHECKPOINT_METADATA"]
    assert brought[-5:] == ["kept/x", "z", *(f"checkpoints/7/{name}" for name in order)]
    assert {f"checkpoints/7/{name}" for name in names} < _names(f"{bucket}/run")
    object_store.close_all()
    assert _names(f"{bucket}/run") == {"config.json", "kept/x", "z"}
    assert [
        "kept/x.json",
        "z.png",
        "checkpoints/7/checksums.json",
        "checkpoints/7/a",
    ]


def test_stores_without_access_are_wrong_usage_before_any_work(bucket):
    with pytest.raises(options.UsageError, match="cannot use s3://elsewhere/run"):
        workdir.open_workdir("s3://elsewhere/run", {})
    with pytest.raises(options.UsageError, match="cannot use odd://a/run"):
        workdir.open_workdir("odd://a/run", {})
    assert not pathlib.Path("odd:").exists()


def test_a_store_that_goes_away_is_an_error_and_costs_nothing(bucket, monkeypatch):
    work = workdir.open_workdir(f"{bucket}/run", {})
    work.write_result({"a": 1})

    def fail(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(object_store.Mirror, "_put", fail)
    with pytest.raises(OSError, match=rf"s3://.*/run does not take .*{work.path}: no route"):
        object_store.close_all()
    assert (work.path / "result.json").exists()


def test_after_a_push_that_failed_the_next_one_brings_what_is_there_then(bucket, monkeypatch):
    work = workdir.open_workdir(f"{bucket}/run", {})
    mirror, path = object_store._open[0], work.path / "checkpoints" / "7" / "a"

    def fail(*_):
        raise ConnectionError("no route")

    with mirror._pushing:  # Of the thread.
        path.parent.mkdir(parents=True)
        path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(mirror, "_put", fail)
        with pytest.raises(ConnectionError):
            mirror.push()
        path.unlink()
        path.write_bytes(b"newer")
    object_store.close_all()
    assert (epath.Path(f"{bucket}/run") / "checkpoints/7/a").read_bytes() == b"newer"


def test_several_processes_need_a_folder(bucket, monkeypatch):
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    with pytest.raises(options.UsageError, match="several processes"):
        workdir.open_workdir(f"{bucket}/run", {})
    assert not _names(f"{bucket}/run")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--output_dir=s3://a/b"], "--output_dir must be"),
        (["--images=here,gs://a/b"], "--images must be"),
        (["--workdir=s3://a/b"], "--workdir must be a folder"),
    ],
)
def test_options_that_name_files_take_no_addresses(flags, message):
    with pytest.raises(options.UsageError, match=message):
        program._check_addresses(program.parse(detect_photos.DetectConfig, flags))
