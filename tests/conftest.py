"""Markers, the seed of each test, and which tests need a GPU.

Run `FLASH_ATTN2_TEST_SEED=n pytest ...` to repeat a failure with the seed that it printed.
"""

import os

import pytest
import torch

from flash_attn2 import ops


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU and the CUDA extension")
    share_the_cores(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def share_the_cores(workers: int) -> None:
    """Under `pytest -n`: workers with as many threads each as there are cores would stand still."""
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of what the tests start


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than sm_80"
    if ops.EXTENSION is None:
        return "flash_attn2._C is not built"
    return None


def pytest_collection_modifyitems(items):
    reason = _why_no_gpu()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed():
    """Fresh random inputs in every run; the seed is printed where a test fails."""
    value = int(os.environ.get("FLASH_ATTN2_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    torch.manual_seed(value)
    print(f"FLASH_ATTN2_TEST_SEED={value}")
    return value


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Both devices; the CUDA half is skipped where it cannot run."""
    return request.param


@pytest.fixture(autouse=True)
def gpu_memory():
    """Gives back what a large test took: other processes that run tests share the GPU."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()
