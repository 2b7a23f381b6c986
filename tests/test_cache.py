"""The cache of compiled programs: where it is, and what happens where it cannot be."""

from pathlib import Path

import jax
import pytest

from jaxtrainer.cache import default_directory, use_compilation_cache
from tests import tiny


@pytest.fixture
def no_cache_yet():
    """JAX has no cache directory yet, and afterwards the one it had."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_default_directory_follows_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = default_directory()
    assert directory is not None
    assert directory.parent == tmp_path / "jaxtrainer" / "xla"


def test_default_directory_differs_by_cpu(monkeypatch):
    names = set()
    for flags in ("fpu avx2", "fpu avx2 avx512f"):
        text = f"processor\t: 0\ncpu MHz\t: {len(flags)}\nflags\t: {flags}\n\nprocessor\t: 1\n"
        monkeypatch.setattr(Path, "read_text", lambda path, text=text, **_: text)
        names.add(default_directory())
    assert len(names) == 2


def test_default_directory_is_none_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert default_directory() is None


def test_unwritable_cache_is_left_alone(no_cache_yet, tmp_path):
    (tmp_path / "file").touch()
    assert not use_compilation_cache(tmp_path / "file" / "cache")
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_fit_without_a_writable_cache_says_so(no_cache_yet, tmp_path):
    (tmp_path / "file").touch()
    module = tiny.Tiny()
    tiny.fit(module=module, max_steps=1, compilation_cache=tmp_path / "file" / "cache")
    assert module.run is not None
    assert any("no cache of compiled programs" in notice for notice in module.run.notices)


def test_cache_that_the_user_chose_stays(no_cache_yet, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert use_compilation_cache(tmp_path / "other")
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "mine")
    assert not (tmp_path / "other").exists()
