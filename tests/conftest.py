"""The environment of the tests: eight CPU devices, strict promotion, nothing inherited.

Runs before anything imports JAX, which reads its variables once, at import.
"""

import contextlib
import functools
import os
import signal
import sys

assert "jax" not in sys.modules, "a pytest plugin imported jax before the environment was set"

# What a developer's shell may hold and the code under test reads: JAX's settings, and what rich
# goes by when it decides on colours, width and a live terminal.
SCRUBBED = ("JAX_", "XLA_", "FLAX_", "TF_", "LIBTPU_", "TTY_", "JUPYTER_")
SCRUBBED_NAMES = {"COLORTERM", "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR"}
for _name in [*os.environ]:
    if _name.startswith(SCRUBBED) or _name in SCRUBBED_NAMES:
        del os.environ[_name]

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXTRAINER_TEST_PLATFORMS", "cpu")
# A cached executable would hide a second compilation from the tests that count them.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

# A suite that a script starts in the background inherits an ignored Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402 (the variables above come first)
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache as jax_cache  # noqa: E402

import mnist_data  # noqa: E402

# In this process only: a program that a test starts runs as a user would run it.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def _with_standard_promotion(update):
    @functools.wraps(update)
    def wrapped(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return update(*args, **kwargs)

    return wrapped


# Optax multiplies its int32 counters with floats (Adam's bias correction, every schedule), which
# strict promotion refuses. Relaxed inside `update` alone, so that all other code stays strict.
optax.GradientTransformation.update = property(  # pyright: ignore[reportAttributeAccessIssue]
    lambda self: _with_standard_promotion(self[1])
)


@contextlib.contextmanager
def _cache_in(folder):
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


@pytest.fixture
def compilation_cache(tmp_path):
    """JAX's persistent compilation cache, on and empty for one test; gives its folder."""
    folder = tmp_path / "compilation_cache"
    with _cache_in(folder):
        yield folder


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(session_folder):
    """One compilation cache for all modules that ask for it: their runs share most programs."""
    with _cache_in(session_folder):
        yield


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """For a recipe as a user runs it: runs, and programs compiled on the way, are kept here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.values["jax_compilation_cache_dir"]
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def noise_digits(monkeypatch):
    """Whichever recipe reads the MNIST files gets 256 pictures of noise as both splits."""
    rng = np.random.default_rng(0)
    labels = np.arange(256, dtype=np.uint8) % 10
    split = {"image": rng.integers(0, 256, (256, 28, 28), np.uint8), "label": labels}
    load_mnist = mnist_data.load_mnist
    for module in [*sys.modules.values()]:
        if getattr(module, "__dict__", {}).get("load_mnist") is load_mnist:
            monkeypatch.setattr(module, "load_mnist", lambda: (split, split))
    return split
