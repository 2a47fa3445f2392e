"""Set-up that every test file shares; fixtures: frameworks, and ``backend``."""

from contextlib import suppress

import pytest

pytest.register_assert_rewrite("tests.checks", "tests.cases")

with suppress(ModuleNotFoundError):  # as on a GPU's machine, whose tests do without
    from hypothesis import settings

    # the same examples each time; a compilation takes longer than any deadline
    settings.register_profile("suite", deadline=None, derandomize=True)
    settings.load_profile("suite")


# What other packages warn of among themselves.
THEIRS = (
    # Keras 3.15 with NumPy 2: Keras' variables, and PyTorch's tensors in convert_to_numpy
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    # mpmath 1.4 when torch.compile's cache pickles, which looks into every module
    "ignore:the [a-z0-9]+ (private )?module is deprecated:DeprecationWarning",
)


def pytest_configure(config):
    for line in THEIRS:
        config.addinivalue_line("filterwarnings", line)


from tests.adapters import ADAPTERS  # noqa: E402
from tests.engines import forget, mappings  # noqa: E402
from tests.frameworks import load  # noqa: E402


def pytest_collection_modifyitems(config, items):
    """Tests of the sigmoid form, say, are none of a backend that has the softmax form alone."""

    def concerns(item):
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        return not any(word in item.nodeid for word in getattr(backend, "left_out", ()))

    config.hook.pytest_deselected(items=[item for item in items if not concerns(item)])
    items[:] = [item for item in items if concerns(item)]


@pytest.fixture(scope="session", params=ADAPTERS, ids=str)
def backend(request):
    """A framework in one mode: a case in, its value and gradient out."""
    request.param.losses  # noqa: B018  imports the framework, or skips
    yield request.param
    forget()  # no test that is left asks for this mode


ROOM = {"mappings": 30_000}  # of the 65,530 that Linux gives a process, which then crashes


@pytest.fixture(autouse=True)
def room():
    """For what the next test compiles; TensorFlow never lets go of what XLA compiled for it."""
    yield
    if mappings() > ROOM["mappings"]:
        forget()
        ROOM["mappings"] = max(ROOM["mappings"], mappings() + 10_000)


def framework(name):
    """A fixture: the framework of that name, or a skip where it is absent."""

    @pytest.fixture(scope="session")
    def loaded():
        return load(name)

    return loaded


torch, jax, keras, tf = map(framework, ("torch", "jax", "keras", "tensorflow"))
