"""Compiler options, memory, and the folder of compiled programs."""

import os
import platform
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.core import backend


@pytest.fixture
def cache_settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("cache_settings")
def test_compilation_cache_lies_in_the_cache_folder_of_the_user(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert backend.enable_compilation_cache() == tmp_path / "afr_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "afr_jax" / "xla")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    assert backend.enable_compilation_cache() == tmp_path / ".cache" / "afr_jax" / "xla"


@pytest.mark.usefixtures("cache_settings")
def test_a_configured_compilation_cache_is_kept(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert backend.enable_compilation_cache() == tmp_path / "mine"
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert backend.enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/cache"


@pytest.mark.usefixtures("cache_settings")
def test_an_unusable_cache_folder_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file"))
    assert backend.enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(
    "version, given, chosen",
    [
        ("0.10.2", None, "--xla_cpu_experimental_ynn_fusion_type="),
        ("0.10.2", "--a=1", "--a=1 --xla_cpu_experimental_ynn_fusion_type="),
        ("0.10.2", "--xla_cpu_experimental_ynn_fusion_type=DOT", None),
        ("0.11.0", None, None),
        ("0.11.0", "--a=1", None),
    ],
)
def test_compiler_options_leave_alone_what_is_said_and_what_was_not_tried(
    version, given, chosen, monkeypatch
):
    monkeypatch.setattr(backend.jaxlib, "__version__", version)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given is not None:
        monkeypatch.setenv("XLA_FLAGS", given)
    for _ in range(2):
        backend.choose_compiler_options()
        assert os.environ.get("XLA_FLAGS") == (given if chosen is None else chosen)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    """Blocks of 64 MiB, freed and allocated again: the system has to clear pages once only."""
    script = """
        import resource, sys
        import numpy as np
        from afr_jax.core import backend, provenance
        if sys.argv[1] == "keep":
            backend.keep_freed_memory()
        faults = []
        for _ in range(4):
            np.ones(8 << 20)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[3] - faults[0])
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    kept, returned = (
        int(subprocess.run([*command, what], capture_output=True, check=True, text=True).stdout)
        for what in ("keep", "return")
    )
    assert kept < 100 < returned


def test_photos_are_limited_by_the_memory_of_the_machine(monkeypatch):
    limits = []
    for gigabytes in (1, 5, 6, 64):
        monkeypatch.setattr(backend, "memory_bytes", lambda bytes_=gigabytes << 30: bytes_)
        backend._pixels_that_fit.cache_clear()
        limits.append(backend.most_pixels())
    backend._pixels_that_fit.cache_clear()
    assert limits == sorted(limits) and limits[0] == 8_000_000 and limits[-1] == 100_000_000
    assert 40e6 < limits[1] < 60e6
    backend.limit_pixels(0.5)
    assert backend.most_pixels() == 500_000
    backend.limit_pixels(None)
    assert backend.most_pixels() >= 8_000_000


def test_memory_is_what_a_shell_allows():
    code = "from afr_jax.core import backend; print(backend.memory_bytes())"
    limited = f"ulimit -v 4000000 && exec {sys.executable} -c '{code}'"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 4000000 << 10 < backend.memory_bytes()


def _fn(x, y):
    return {"sum": jnp.sin(x) + y, "turned": x.T}


def test_values_and_gradients_are_those_of_the_function():
    x, y = jax.random.normal(jax.random.key(0), (2, 3, 4))
    bounded = jax.jit(lambda x, y: backend.apart(_fn, x, y))
    jax.tree.map(np.testing.assert_array_equal, bounded(x, y), jax.jit(_fn)(x, y))
    gradient = jax.grad(lambda x, y: bounded(x, y)["sum"].sum(), argnums=(0, 1))(x, y)
    np.testing.assert_allclose(gradient[0], jnp.cos(x), rtol=1e-6)
    np.testing.assert_array_equal(gradient[1], jnp.ones_like(y))


def test_numbers_that_are_none_pass():
    found = backend.apart(lambda x: 2 * x, jnp.array([jnp.nan, jnp.inf, 1.0]))
    np.testing.assert_array_equal(found, [np.nan, np.inf, 2.0])


def test_on_cpu_it_stays_a_branch_in_a_batch_too():
    x, y = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    batched = jax.jit(jax.vmap(lambda x, y: backend.apart(_fn, x, y)))
    jax.tree.map(np.testing.assert_array_equal, batched(x, y), jax.jit(jax.vmap(_fn))(x, y))
    text = batched.lower(x, y).compile().as_text()
    assert ("conditional(" in text) == (jax.default_backend() == "cpu")


def test_sums_of_planes_and_their_gradient():
    planes = np.random.default_rng(0).normal(size=(3, 2, 7, 9)).astype(np.float32)
    sums = jax.jit(jax.vmap(backend.plane_sums))(planes)
    np.testing.assert_allclose(sums, planes.astype(np.float64).sum((2, 3)), rtol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(backend.plane_sums(x) ** 2))(planes)
    expected = np.broadcast_to(2 * sums[..., None, None], planes.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
