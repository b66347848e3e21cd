"""The local page in a browser, on a real server: what people do, and what others try."""

import base64
import contextlib
import http.client
import importlib.resources
import io
import json
import os
import pathlib
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
import zlib

import browsers
import numpy as np
import programs
import pytest
import skimage.data
from PIL import Image

from afr_jax.app import app_program, jobs, limits, sessions

_HTML_NAME = "<img src=x onerror=\"document.title='owned'\">.png"
_PATIENCE_S = 240


class _Server:
    """A server in a process of its own, with its temporary folder."""

    def __init__(self, folder, *flags):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.app", "--port=0", f"--temp_dir={folder}", *flags],
            cwd=programs.ROOT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"http://\S+", line):
                self.url = found.group()
                break
        else:
            raise AssertionError("".join(self.log))
        # What nobody reads would block it.
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        self.log += self.process.stderr

    def files(self):
        return [path for path in self.folder.rglob("*") if path.is_file() and path.name != ".lock"]

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        return self.process.wait(_PATIENCE_S)


@contextlib.contextmanager
def _served(folder, *flags):
    server = _Server(folder, *flags)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        server.process.stderr.close()


def _portrait(count=1):
    """So many small portraits side by side."""
    return np.concatenate([skimage.data.astronaut()[:224, 128:352]] * count, axis=1)


def _huge_png():
    """The beginning of a PNG of 500 megapixels."""
    header = b"IHDR" + struct.pack(">LLBBBBB", 25_000, 20_000, 8, 2, 0, 0, 0)
    crc = struct.pack(">L", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">L", 13) + header + crc + b"\0\1\0\0IDAT"


def _until(look, what):
    """Waits until something is there, and returns it."""
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError(f"there is no {what}")


def _find(browser, css):
    return browser.find_elements("css selector", css)


def _drop(browser, place, name, data):
    """Drops a file on a place of the page."""
    script = """
      const [id, name, text] = arguments;
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      const files = new DataTransfer();
      files.items.add(new File([bytes], name));
      const zone = document.getElementById(id).closest(".drop");
      zone.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true}));
    """
    browser.execute_script(script, place, name, base64.b64encode(data).decode())


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _check_page(browser, server):
    """Accessible, no wider than a phone, a quiet console, and no request to anybody else."""
    axe = importlib.resources.files("axe_core_python").joinpath("axe.min.js").read_text()
    for width, scheme in ((1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")):
        browsers.view(browser, width, scheme=scheme)
        # The policy of the page stops what is added to it, but not what its debugger runs.
        browser.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
        answer = browser.execute_cdp_cmd(
            "Runtime.evaluate",
            {
                "expression": "axe.run().then((found) => JSON.stringify(found.violations))",
                "awaitPromise": True,
            },
        )
        faults = [
            (fault["id"], [node["html"] for node in fault["nodes"]])
            for fault in json.loads(answer["result"]["value"])
            if fault["impact"] in ("serious", "critical")
        ]
        assert not faults, (width, scheme)
        needed = browser.execute_script("return document.documentElement.scrollWidth")
        assert needed <= width
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    # The pages of the browser itself come from itself.
    assert all(re.match(rf"{server.url}|chrome:|data:|about:", url) for url in asked), asked


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    with _served(folder, "--toy", "--surrogates=dlib") as server:
        yield server
        # Told to end, it leaves nothing.
        assert server.stop() == 128 + signal.SIGTERM
        assert not list((folder / os.listdir(folder)[0]).iterdir())


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory, downloads):
    with browsers.opened(tmp_path_factory.mktemp("profile"), downloads=downloads) as driver:
        yield driver


def test_photos_are_cloaked_by_hand_with_the_bytes_of_the_program(
    browser, server, downloads, tmp_path
):
    photo = tmp_path / "two.png"
    Image.fromarray(_portrait(2)).save(photo)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(3000))
    browsers.view(browser, 1200)
    browser.get(server.url)
    chosen = "\n".join(str(tmp_path / name) for name in ("two.png", "broken.jpg"))
    _find(browser, "#photos")[0].send_keys(chosen)
    _until(lambda: len(_find(browser, ".photo")) == 2, "photo")
    _drop(browser, "photos", _HTML_NAME, _png(np.zeros((64, 64, 3), np.uint8)))
    _until(lambda: len(_find(browser, ".photo")) == 3, "photo")
    _drop(browser, "photos", "huge.png", _huge_png())
    _until(
        lambda: len(_find(browser, "[data-state=done], [data-state=failed]")) == 4, "look at all"
    )
    texts = {card.text.splitlines()[0]: card.text for card in _find(browser, ".photo .about")}
    assert "damaged or incomplete" in texts["broken.jpg"]
    assert "No face was found" in texts[_HTML_NAME]
    assert "megapixels" in texts["huge.png"]
    assert "2 faces found, 2 chosen" in texts["two.png"]
    assert browser.title == "Cloak photos, afr_jax"  # the name did not run

    _, second = _find(browser, ".box")
    assert second.get_attribute("aria-pressed") == "true"
    second.click()
    start = _until(lambda: _find(browser, "#start:enabled"), "start")[0]
    assert start.text == "Cloak 1 face"
    assert _find(browser, ".box")[1].get_attribute("aria-pressed") == "false"
    _check_page(browser, server)
    browsers.view(browser, 1200)
    start.click()
    _until(lambda: _find(browser, ".result"), "result")
    (result,) = _find(browser, ".result")
    assert "Face 1" in result.text and "the cloak was made against it" in result.text

    slider = result.find_element("css selector", "input[type=range]")
    before = result.find_element("css selector", ".stage img:nth-child(2)")
    places = []
    for key in ("\ue010", "\ue011", "\ue014" * 20):  # end, home, right arrows
        slider.send_keys(key)
        hidden = re.search(r"inset\(0px ([\d.]+)px", before.get_attribute("style"))
        places.append(float(hidden[1]) if hidden else 0.0)
    width = before.size["width"]
    assert places == pytest.approx([0, width, 0.8 * width], abs=1)
    assert slider.get_attribute("aria-valuetext") == "20 % before, 80 % after"
    natural = "return [...arguments[0].querySelectorAll('img')].map((one) => one.naturalWidth)"
    assert browser.execute_script(natural, result) == [448, 448, 448]
    for button in result.find_elements("css selector", ".tools button"):
        button.click()
    assert not slider.is_displayed()  # the difference is shown now
    _check_page(browser, server)

    browsers.view(browser, 1200)
    _find(browser, "#results a.main")[0].click()
    archive = _until(lambda: list(downloads.glob("*.zip")), "download")[0]
    box = _until(lambda: _state(browser)["job"], "job")["result"]["photos"][0]["faces"][0]["box"]
    y0, x0, y1, x1 = box
    done, _ = programs.run(
        "cloak",
        f"--images={photo}",
        f"--output_dir={tmp_path / 'out'}",
        f"--faces={x0!r},{y0!r},{x1 - x0!r},{y1 - y0!r}",
        "--surrogates=dlib",
        "--toy",
    )
    assert done.returncode == 0, done.stderr
    expected = (tmp_path / "out" / "two_cloaked.png").read_bytes()
    with zipfile.ZipFile(archive) as opened:
        assert opened.namelist() == ["two_cloaked.png", "report.json"]
        assert opened.read("two_cloaked.png") == expected
        report = json.loads(opened.read("report.json"))
    assert report["images"][0]["status"] == "partly_cloaked" or report["images"][0]["faces"]
    changed = np.any(np.asarray(Image.open(io.BytesIO(expected))) != _portrait(2), axis=(0, 2))
    assert changed[:224].any() and not changed[300:].any()


def _state(browser):
    script = (
        "const [done] = arguments; fetch('/api/state?tool=cloak').then((a) => a.json()).then(done)"
    )
    return browser.execute_async_script(script)


@pytest.mark.parametrize("tool", ["check", "patch", "protect"])
def test_the_other_pages_are_accessible_and_fit(browser, server, tool):
    browser.get(f"{server.url}{tool}")
    _until(lambda: not _find(browser, "#alert:not([hidden])"), "page")
    _check_page(browser, server)


def _cookie_and_token(server):
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port)
    connection.request("GET", "/")
    answer = connection.getresponse()
    cookie = answer.headers["set-cookie"].partition(";")[0]
    token = re.search(r'afr-token" content="([^"]+)', answer.read().decode())[1]
    connection.close()
    return {"cookie": cookie, "x-afr-token": token}


def test_of_twenty_uploads_at_once_only_some_are_taken(server):
    headers = _cookie_and_token(server)
    address = urllib.parse.urlsplit(server.url)
    data = b"\x89PNG\r\n\x1a\n" + bytes(10_000)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    opened = []
    for number in range(20):
        connection = socket.create_connection((address.hostname, address.port))
        path = f"/api/files?tool=cloak&role=photo&name={number}.png"
        head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\n{lines}"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data[:100])
        opened.append(connection)
    # Those that are not taken are told at once, before the rest of their files.
    refused = set()
    end = time.monotonic() + _PATIENCE_S
    while len(refused) < 20 - limits.MOST_UPLOADS and time.monotonic() < end:
        for connection in set(opened) - refused:
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                assert connection.recv(4096).startswith(b"HTTP/1.1 429")
                refused.add(connection)
    assert len(refused) == 20 - limits.MOST_UPLOADS
    for connection in set(opened) - refused:
        connection.settimeout(_PATIENCE_S)
        connection.sendall(data[100:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    for connection in opened:
        connection.close()


def test_reload_two_browsers_cancel_and_a_killed_server(browser, tmp_path):
    photo = _png(_portrait())
    folder = tmp_path / "app"
    with (
        browsers.opened(tmp_path / "profile") as other,
        _served(folder, "--num_steps=100000", "--surrogates=dlib") as server,
    ):
        browsers.view(browser, 1200)
        browser.get(server.url)
        _drop(browser, "photos", "a.png", photo)
        _until(lambda: _find(browser, "#start:enabled"), "start")[0].click()
        _until(lambda: "step " in _find(browser, "#work-text")[0].text, "progress")
        job = _state(browser)["job"]
        browser.refresh()
        _until(lambda: "step " in _find(browser, "#work-text")[0].text, "progress after the reload")
        after = _state(browser)["job"]
        assert after["id"] == job["id"] and after["state"] == "running"
        assert after["stages"]["face steps"][0] >= job["stages"]["face steps"][0] > 0
        assert len(_find(browser, ".photo[data-state=done]")) == 1

        other.get(server.url)
        _drop(other, "photos", "b.png", photo)
        waiting = _until(lambda: _find(other, ".photo[data-state=waiting]"), "waiting photo")
        assert "1 before it" in waiting[0].text
        assert [upload["name"] for upload in _state(other)["uploads"]] == ["b.png"]

        _find(browser, "#work-cancel")[0].click()
        _until(lambda: "Cancelled" in _find(browser, "#results")[0].text, "word that it is over")
        _until(lambda: _find(other, ".photo[data-state=done]"), "photo of the other browser")
        assert browser.get_log("browser") == [] == other.get_log("browser")

        session = _state(browser)
        assert session["job"]["state"] == "cancelled"
        assert len(server.files()) >= 2
        workers = _children(server.process.pid)
        assert len(workers) == 1
        server.stop(signal.SIGKILL)
        assert len(server.files()) >= 2
        store = sessions.Store(str(folder), jobs.Worker(app_program.AppConfig()))
        assert not server.files()
        store.close()
        # Nobody speaks to its worker any more.
        _until(lambda: not any(map(_is_alive, workers)), "end of the worker")


def _resident(number):
    """Memory of a process in megabytes."""
    status = pathlib.Path(f"/proc/{number}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000


@pytest.mark.slow
def test_memory_returns_to_its_level_after_fifty_jobs(tmp_path):
    photo = _png(_portrait())
    with (
        contextlib.ExitStack() as stack,
        _served(tmp_path, "--toy", "--surrogates=dlib") as server,
    ):
        headers = _cookie_and_token(server)
        address = urllib.parse.urlsplit(server.url)
        connection = http.client.HTTPConnection(address.hostname, address.port)
        stack.callback(connection.close)

        def ask(method, path, body=None):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            found = json.loads(answer.read())
            assert answer.status == 200, found
            return found

        def state():
            return ask("GET", "/api/state?tool=cloak&page=one")

        upload = ask("POST", "/api/files?tool=cloak&role=photo&name=a.png", photo)["id"]
        _until(lambda: state()["uploads"][0]["look"]["state"] == "done", "look")
        order = {"kind": "cloak", "mode": "mid", "format": "png", "surrogates": ["dlib"]}
        body = json.dumps({**order, "faces": {upload: [0]}})
        levels = []
        for _ in range(50):
            job = ask("POST", "/api/jobs", body)["id"]
            done = _until(
                lambda job=job: (found := state()["job"])["state"] == "done" and found["id"] == job,
                "job",
            )
            assert done
            children = _children(server.process.pid)
            levels.append([_resident(number) for number in (server.process.pid, *children)])
        serving, working = np.array(levels).T
        # The first jobs compile; the others leave nothing behind.
        assert serving[-1] < serving[4] + 20
        assert working[-1] < working[4] + 100
        # One job's files are there, not fifty's.
        assert len(server.files()) < 12


def _children(number):
    found = []
    for path in os.listdir("/proc"):
        if path.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{path}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
                if fields[0] != "Z" and int(fields[1]) == number:
                    found.append(int(path))
    return found


def _is_alive(number):
    try:
        return "State:\tZ" not in pathlib.Path(f"/proc/{number}/status").read_text()
    except FileNotFoundError:
        return False
