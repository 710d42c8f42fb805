"""Sets up tests: eight virtual CPU devices, one compilation cache, no network, jaxtyping annotations checked."""

import atexit
import os
import shutil
import tempfile

import jaxtyping
from beartype import BeartypeConf, beartype

from tests.support.processes import FAST_COMPILE_FLAGS

# Read once, when jax and huggingface_hub are first imported, so set before either is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(  # of the same flag, the last counts
    [
        FAST_COMPILE_FLAGS if os.environ["JAX_PLATFORMS"] == "cpu" else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Set before pytest-xdist starts its workers, so that they share it, as do the commands that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpo-jax-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

# A (3,) quietly broadcast against a (3, 1) is the commonest way for a loss to be wrong and still train.
jax.config.update("jax_numpy_rank_promotion", "raise")

check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float, as pyright has it
jaxtyping.install_import_hook("dpo_jax", "conftest.check_types")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Keeps tokenized data of tests out of the user's cache; subprocesses inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("DPO_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def no_flags_of_cpus_for_tpus(request, monkeypatch):
    """The compiler for TPUs ends the process at a flag that it does not know; that for CPUs has read its flags."""
    if request.node.get_closest_marker("tpu_aot"):
        jax.devices()
        monkeypatch.delenv("XLA_FLAGS")
