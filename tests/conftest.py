"""The setting of all tests: 4 CPU devices, strict shapes, parsed flags, shared research data."""

import contextlib
import gc
import os
import pathlib
import secrets
import signal
import subprocess
import unittest

import browsers
import chex
import fsspec
import jax
import jaxlib
import pytest
from absl import flags

from afr_jax.core import backend, parallel

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_SHARED = pathlib.Path(os.environ.get("AFR_SHARED") or _ROOT.parent / "shared")

# Subprocesses of tests inherit these two; the settings below reach only this process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "xla"))

# Four devices share the cores of the machine. Where other work delays one of them, XLA takes the
# others' waiting for a deadlock after 40 s and aborts. It also aborts at options it does not know.
if jaxlib.__version__.startswith("0.10."):
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {patience}".strip()
backend.choose_compiler_options()
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
flags.FLAGS.mark_as_parsed()
# A suite that a script starts in the background inherits SIGINT as ignored, and so would its
# children, which some tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not config.getoption("--slow"):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if not _has_shared_data():
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(pytest.mark.skip(reason=_no_shared_data()))


@pytest.fixture(scope="session")
def object_store_server():
    """An S3 server on this machine, which every library and child process finds."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield
    server.stop()


@pytest.fixture
def bucket(object_store_server):
    """The address of a new bucket."""
    address = f"s3://{secrets.token_hex(8)}"
    fsspec.filesystem("s3").mkdir(address)
    return address


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Forgets compiled programs now and then: each takes memory maps, of which a process of Linux
    may have 65,530; the next program would end it with a segmentation fault."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of the shared research data; skips the test where there is none."""
    if not _has_shared_data():
        pytest.skip(_no_shared_data())
    return _SHARED


@pytest.fixture
def start_process():
    """Starts children that lead a process group of their own; what is left is ended afterwards."""
    started = []

    def start(command, **options):
        process = subprocess.Popen(
            command,
            text=True,
            start_new_session=True,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium on an empty profile, its console recorded."""
    with browsers.opened(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def compiled():
    """Names of the programs that are compiled from here on: a list that grows."""
    names = []

    def listen(event: str, seconds: float, **details) -> None:
        del seconds
        if event.endswith("backend_compile_duration"):
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def no_compilation(compiled):
    """A context in which nothing may be compiled that has not been before."""

    @contextlib.contextmanager
    def context():
        before = len(compiled)
        yield
        assert not compiled[before:], "programs were compiled"

    return context


@pytest.fixture(params=["with_jit", "without_jit"])
def variant(request):
    """`variant(fn, static_argnames=...)` is `fn` compiled, and as it is: the variants of chex."""
    found = []

    class Case(chex.TestCase):
        @chex.variants(**{request.param: True})
        def test(self):
            found.append(self.variant)
            # A case that makes no use of its variant is an error.
            assert self.variant(abs)(-1) == 1

    (name,) = unittest.defaultTestLoader.getTestCaseNames(Case)
    Case(name).debug()
    return found[0]


@pytest.fixture
def one_device() -> parallel.Mesh:
    """A mesh of one device: what `spread` is compared with."""
    return parallel.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(params=[(1, "pmap"), (4, "jit"), (4, "pmap")], ids=["1-pmap", "4-jit", "4-pmap"])
def spread(request) -> tuple[parallel.Mesh, parallel.Backend]:
    """Devices and backend of `parallel.map_batches`; what it maps gives one device's results."""
    count, backend_name = request.param
    return parallel.make_mesh(devices=jax.devices()[:count]), backend_name


def _has_shared_data() -> bool:
    return (_SHARED / "data").is_dir() and (_SHARED / "weights").is_dir()


def _no_shared_data() -> str:
    return f"no shared research data (data/ and weights/) in {_SHARED}; set AFR_SHARED"
