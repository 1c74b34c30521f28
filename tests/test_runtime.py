"""Where compiled programs are kept."""

import jax
import pytest

from sdpo_jax.system.processes import set_up_jax


@pytest.fixture
def cache_setting():
    """Sets jax's cache folder for a test, and then puts back what it was."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda folder: jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_where_the_environment_says(cache_setting, tmp_path):
    cache_setting(str(tmp_path))
    set_up_jax("bfloat16")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_compiled_programs_are_else_kept_in_the_cache_folder(cache_setting, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_setting(None)
    set_up_jax("bfloat16")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "sdpo_jax" / "xla")
