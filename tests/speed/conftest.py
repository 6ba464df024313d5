import os

import pytest
import torch

RATIOS = pytest.StashKey[dict[str, str]]()


def pytest_configure(config):
    config.stash[RATIOS] = {}


@pytest.fixture(autouse=True)
def alone():
    """Speed is not measured beside other tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("measured alone: pytest tests/speed")


@pytest.fixture
def report(request):
    """Note a line that is printed after the tests."""
    return lambda name, line: request.config.stash[RATIOS].__setitem__(name, line)


def pytest_terminal_summary(terminalreporter, config):
    for name, line in config.stash[RATIOS].items():
        terminalreporter.write_line(f"{name}: {line}")


def _threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """What a run gets on two cores, and far steadier than two."""
    yield from _threads(1)


@pytest.fixture
def two_threads():
    """As many as the loader that is compared with has workers."""
    yield from _threads(2)
