"""Set-up that every test file shares."""

import pytest

pytest.register_assert_rewrite("tests.checks")
