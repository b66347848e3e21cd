"""The server of the page: sessions, limits, and requests that it must refuse."""

import dataclasses
import json
import pathlib
import re
import time

import pytest
from starlette import testclient

from afr_jax.app import app_program, guard, jobs, limits, server, sessions
from afr_jax.core import options

_PHOTO = b"\x89PNG\r\n\x1a\n" + bytes(100)
_HOST = "127.0.0.1:8765"


class _Page:
    """A browser's page: a client with its cookie and its token."""

    def __init__(self, app, tool=""):
        self.client = testclient.TestClient(app, base_url=f"http://{_HOST}")
        answer = self.client.get(f"/{tool}")
        self.token = re.search(r'afr-token" content="([^"]+)', answer.text)[1]

    def post(self, path, content=b"{}", **headers):
        return self.client.post(
            path, content=content, headers={"x-afr-token": self.token, **headers}
        )

    def send(self, name="a.png", data=_PHOTO, *, tool="cloak", role="photo"):
        query = {"tool": tool, "role": role, "name": name}
        return self.client.post(
            "/api/files", params=query, content=data, headers={"x-afr-token": self.token}
        )

    def state(self, tool="cloak", page="one"):
        return self.client.get("/api/state", params={"tool": tool, "page": page}).json()


@pytest.fixture
def parts(tmp_path):
    """App, worker and store; the worker has no process, so jobs wait."""
    config = app_program.AppConfig(temp_dir=str(tmp_path))
    worker = jobs.Worker(config)
    store = sessions.Store(config.temp_dir, worker)
    yield server.App(config, worker, store), worker, store
    store.close()


@pytest.fixture
def page(parts):
    return _Page(parts[0].asgi())


def _files(store):
    return [path for path in store.root.rglob("*") if path.is_file() and path.name != ".lock"]


def test_pages_load_nothing_from_elsewhere_and_say_what_may_load(page):
    for tool in ("", "check", "patch", "protect"):
        answer = page.client.get(f"/{tool}")
        assert answer.status_code == 200
        links = re.findall(r'(?:src|href)="([^"]*)"', answer.text)
        assert links and all(re.match(r"/[\w/.]*$|#", link) for link in links)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
    for name in ("page.js", "cloak.js", "compare.js", "app.css"):
        text = page.client.get(f"/static/{name}").text
        assert not re.search(r"https?://|@import|innerHTML|outerHTML|insertAdjacent|eval\(", text)


@pytest.mark.parametrize(
    "host, is_ours",
    [
        ("127.0.0.1:8765", True),
        ("localhost:8765", True),
        ("[::1]:8765", True),
        ("127.0.0.1:9", False),
        ("evil.example:8765", False),
        ("127.0.0.1.evil.example:8765", False),
        ("192.168.0.7:8765", False),
        ("", False),
    ],
)
def test_other_hosts_are_refused(parts, host, is_ours):
    client = testclient.TestClient(parts[0].asgi(), base_url=f"http://{_HOST}")
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == (200 if is_ours else 421)
    assert bool(answer.cookies) == is_ours


def test_an_open_address_admits_addresses_but_no_foreign_names():
    config = app_program.AppConfig(host="0.0.0.0")
    assert guard.is_own_host("192.168.0.7:8765", config)
    assert guard.is_own_host("[fe80::1]:8765", config)
    assert not guard.is_own_host("evil.example:8765", config)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1234"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_requests_of_other_sites_are_refused(parts, page, headers):
    for path in ("/api/jobs", "/api/bye", "/api/files?tool=cloak&role=photo&name=a.png"):
        assert page.post(path, _PHOTO, **headers).status_code == 403
    assert page.client.get("/api/state", headers=headers).status_code == 403
    assert not _files(parts[2])


def test_writing_needs_the_token_of_the_own_session(parts, page):
    other = _Page(parts[0].asgi())
    for token in ("", "x", other.token):
        for path in ("/api/jobs", "/api/files?tool=cloak&role=photo&name=a.png"):
            answer = page.client.post(path, content=_PHOTO, headers={"x-afr-token": token})
            assert answer.status_code == 403
    bye = json.dumps({"token": other.token, "page": "one"})
    assert page.client.post("/api/bye", content=bye).status_code == 403
    assert not _files(parts[2])


def test_another_address_needs_the_token_of_the_server(parts):
    app = parts[0]
    app.config = dataclasses.replace(app.config, host="0.0.0.0")
    client = testclient.TestClient(app.asgi(), base_url=f"http://{_HOST}")
    assert client.get("/").status_code == 403
    assert client.get("/?token=wrong").status_code == 403
    assert client.get("/api/state").status_code == 403
    assert client.post("/api/files?tool=cloak&role=photo&name=a", content=b"x").status_code == 403
    assert app.address.endswith(f"/?token={app.token}")
    answer = client.get(f"/check?token={app.token}")
    assert answer.status_code == 200 and str(answer.url).endswith("/check")
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/x.png", "..\\x.png", "x.png", "%2e%2e/x.png"]
)
def test_names_are_no_paths(parts, page, name):
    assert page.send(name).status_code == 200
    (path,) = _files(parts[2])
    assert re.fullmatch(r"[0-9a-f]{16}", path.name)
    assert page.state()["uploads"][0]["name"] == "x.png"
    traversal = ["/out/../../x/y", "/out/x/../../../etc/passwd", "/static/../server.py"]
    for bad in (*traversal, "/static/%2e%2e/server.py", "/static//etc/passwd"):
        assert page.client.get(bad).status_code in (403, 404)


def test_folder_names_that_lead_out_are_refused(page):
    answer = page.send("anna/../../x.png", tool="check", role="people")
    assert answer.status_code == 400 and "leads out" in answer.json()["error"]
    assert page.send("anna/x.png", tool="check", role="people").status_code == 200
    assert page.state("check")["uploads"][0]["name"] == "anna/x.png"


@pytest.mark.parametrize(
    "tool, role, name, data, status, words",
    [
        ("cloak", "photo", "a.txt", b"hello", 400, "not a photo"),
        ("cloak", "photo", "a.svg", b"<svg onload=alert(1)>", 400, "not a photo"),
        ("cloak", "photo", "a.png", b"", 400, "empty"),
        ("patch", "train", "a.exe", b"MZ", 400, "no film"),
        ("patch", "train", "a.m3u8", b"#EXTM3U", 400, "no film"),
        ("protect", "zip", "a.rar", b"x", 400, "no zip"),
        ("cloak", "zip", "a.zip", b"x", 400, "no such place"),
        ("protect", "zip", "a.zip", bytes(2 * limits.MEGABYTE), 413, "larger than 1 MB"),
    ],
)
def test_wrong_files_are_refused_in_words(parts, tool, role, name, data, status, words):
    app = parts[0]
    app.config = dataclasses.replace(app.config, max_upload_mb=1)
    page = _Page(app.asgi())
    answer = page.send(name, data, tool=tool, role=role)
    assert answer.status_code == status and words in answer.json()["error"]
    assert not _files(parts[2])


def test_counts_and_sizes_have_limits(parts, page, monkeypatch):
    for number in range(limits.MOST_PHOTOS):
        assert page.send(f"{number}.png").status_code == 200
    assert "at most" in page.send("one more.png").json()["error"]
    other = _Page(parts[0].asgi())
    parts[0].config = dataclasses.replace(parts[0].config, max_session_mb=1)
    assert "together" in other.send(data=_PHOTO + bytes(limits.MEGABYTE)).json()["error"]
    monkeypatch.setattr(limits, "FREE_BYTES", 10**18)
    assert "disk" in other.send().json()["error"]


def test_the_declared_size_is_kept(parts, page):
    query = {"tool": "cloak", "role": "photo", "name": "a.png"}
    headers = {"x-afr-token": page.token, "content-length": "50"}
    answer = page.client.post("/api/files", params=query, content=_PHOTO, headers=headers)
    assert answer.status_code == 400 and "larger than it was said" in answer.json()["error"]
    headers["content-length"] = "500"
    answer = page.client.post("/api/files", params=query, content=_PHOTO, headers=headers)
    assert answer.status_code == 400 and "as a whole" in answer.json()["error"]
    chunks = page.client.post(
        "/api/files", params=query, content=iter([_PHOTO]), headers={"x-afr-token": page.token}
    )
    assert chunks.status_code == 411
    assert not _files(parts[2])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"kind": "rm"}',
        b'{"kind": "cloak"}',
        b'{"kind": "cloak", "mode": "max", "format": "png", "faces": {}, "surrogates": ["dlib"]}',
        b'{"kind": "cloak", "mode": "mid", "format": "png", "faces": {}, "surrogates": []}',
        b'{"kind": "cloak", "mode": "mid", "format": "png", "faces": {"x": [0]}, "surrogates": []}',
        b'{"kind": "pair"}',
        b'{"kind": "patch", "placement": {"a": 1}}',
        b'{"kind": "protect"}',
        b" " * 2_000_000,
    ],
)
def test_orders_that_cannot_be_done_are_refused(parts, page, body):
    answer = page.post("/api/jobs", body)
    assert answer.status_code in (400, 413) and answer.json()["error"]
    assert page.state()["job"] is None


def test_one_job_a_page_and_a_queue(parts, page):
    app = parts[0]
    page.send("film.gif", b"GIF89a", tool="patch", role="train")
    order = {"kind": "patch", "placement": "cheeks", "length": "quick", "face_width_mm": "140"}
    assert page.post("/api/jobs", json.dumps(order).encode()).status_code == 200
    assert page.post("/api/jobs", json.dumps(order).encode()).status_code == 409
    other = _Page(app.asgi())
    other.send("film.gif", b"GIF89a", tool="patch", role="train")
    assert other.post("/api/jobs", json.dumps(order).encode()).status_code == 200
    job = other.state("patch")["job"]
    assert (job["state"], job["ahead"]) == ("waiting", 1)
    mine = page.state("patch")["job"]["id"]
    # Nobody sees or stops the work of others.
    other.post(f"/api/jobs/{mine}/cancel")
    assert page.state("patch")["job"]["state"] == "waiting"
    assert other.client.get(f"/out/{mine}/pdf").status_code == 404
    page.post(f"/api/jobs/{mine}/cancel")
    assert page.state("patch")["job"]["state"] == "cancelled"
    assert other.state("patch")["job"]["ahead"] == 0


def test_the_folder_goes_when_the_page_is_closed(parts, page, monkeypatch):
    store = parts[2]
    page.send()
    page.state(page="one")
    page.state(page="two")
    assert len(_files(store)) == 1

    def bye(name):
        page.client.post("/api/bye", content=json.dumps({"token": page.token, "page": name}))

    monkeypatch.setattr(sessions, "CLOSED_S", -1.0)
    bye("one")
    store.sweep()
    assert len(_files(store)) == 1  # another page is still open
    bye("two")
    page.state(page="three")  # it was loaded again
    store.sweep()
    assert len(_files(store)) == 1
    bye("three")
    store.sweep()
    assert not _files(store)
    assert page.client.get("/api/state").status_code == 403


def test_what_a_late_job_writes_goes_too(parts, page):
    _, worker, store = parts
    page.send()
    (session,) = store._sessions.values()
    (upload,) = session.uploads.values()
    store.drop(session)
    upload.look.folder.mkdir(parents=True)
    (upload.look.folder / "preview.jpg").write_bytes(b"x")
    worker.on_end(upload.look)
    assert not _files(store)


def test_a_base_of_somebody_else_is_not_used(tmp_path):
    worker = jobs.Worker(app_program.AppConfig())
    target = tmp_path / "elsewhere"
    target.mkdir()
    name = sessions._private_base(tmp_path).name
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(target)
    with pytest.raises(options.UsageError, match="somebody else"):
        sessions.Store(str(tmp_path), worker)
    assert not list(target.iterdir())


def test_too_many_sessions_make_room_only_where_nothing_lies(parts):
    app, _, store = parts
    keeper = _Page(app.asgi())
    keeper.send()
    for _ in range(2 * limits.MOST_SESSIONS):
        assert testclient.TestClient(app.asgi(), base_url=f"http://{_HOST}").get("/").is_success
    assert len(store._sessions) == limits.MOST_SESSIONS
    assert len(keeper.state()["uploads"]) == 1


def test_an_upload_on_its_way_keeps_its_session(parts):
    _, _, store = parts
    busy = store.create()
    busy.reserved = 1
    idle = store.create()
    for _ in range(2 * limits.MOST_SESSIONS):
        store.create()
    assert store.get(busy.id) is busy
    assert store.get(idle.id) is None and idle.is_closed


def test_time_left_is_that_of_the_last_stage(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    job = jobs.PageJob("cloak", "cloak", {}, pathlib.Path("/nowhere"))
    job.start()
    job.advance("face steps", 0, 100)
    now[0] += 30  # compilation
    job.advance("face steps", 1, 100)
    assert job.describe(ahead=0)["seconds_left"] is None
    now[0] += 10
    job.advance("face steps", 21, 100)
    assert job.describe(ahead=0)["seconds_left"] == pytest.approx(79 * 0.5)
    job.advance("photos", 0, 3)
    assert job.describe(ahead=0)["seconds_left"] is None
    assert job.describe(ahead=0)["seconds"] == 40


@pytest.mark.parametrize(
    "host, is_local",
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_which_addresses_are_local(host, is_local):
    assert app_program.AppConfig(host=host).is_local == is_local


def test_a_port_in_use_is_said_in_one_line(tmp_path):
    with server._bound(app_program.AppConfig(port=0)) as listener:
        port = listener.getsockname()[1]
        config = app_program.AppConfig(port=port, temp_dir=str(tmp_path))
        with pytest.raises(options.UsageError, match=f"--port={port}"):
            app_program.run(config)
    assert not list(tmp_path.iterdir())
