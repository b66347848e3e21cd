import jax
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
