import pytest

RATIOS = pytest.StashKey[dict[str, str]]()


def pytest_configure(config):
    config.stash[RATIOS] = {}


@pytest.fixture
def report(request):
    """Note a line that is printed after the tests."""
    return lambda name, line: request.config.stash[RATIOS].__setitem__(name, line)


def pytest_terminal_summary(terminalreporter, config):
    for name, line in config.stash[RATIOS].items():
        terminalreporter.write_line(f"{name}: {line}")
