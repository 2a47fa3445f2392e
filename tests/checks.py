"""What tests assert: a sentence, or numbers within the tolerance of their dtype."""

from contextlib import contextmanager

import numpy as np
import pytest


@contextmanager
def refuses(kind, sentence):
    """Require an error of exactly this kind, saying exactly this."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    assert str(caught.value) == sentence


def assert_within(actual, exact, bound, what=""):
    """Require |actual - exact| <= bound; inf and NaN must be the same."""
    bound = np.where(np.isfinite(bound), bound, 1.0)
    with np.errstate(over="ignore"):  # anything, where 0 is exact, by the smallest number
        actual, exact = actual / bound, exact / bound
    np.testing.assert_allclose(
        actual, exact, rtol=0, atol=1, err_msg=f"{what}, in units of the tolerance"
    )
