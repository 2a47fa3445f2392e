"""Set-up that every test file shares; the ``backend`` fixture."""

import os

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.checks", "tests.cases")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# the same examples each time; a compilation takes longer than any deadline
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_configure(config):
    # Keras 3.15 and NumPy 2: Keras' variables, and PyTorch's tensors in convert_to_numpy
    message = "__array__ implementation doesn't accept a copy keyword"
    config.addinivalue_line("filterwarnings", f"ignore:{message}:DeprecationWarning")


from tests.adapters import ADAPTERS  # noqa: E402


@pytest.fixture(scope="session", params=ADAPTERS, ids=str)
def backend(request):
    """A framework in one mode: a case in, its value and gradient out."""
    request.param.losses  # noqa: B018  imports the framework, or skips
    return request.param
