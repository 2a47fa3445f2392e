"""What tests assert: a sentence, or numbers within the tolerance of their dtype."""

from contextlib import contextmanager

import pytest


@contextmanager
def refuses(kind, sentence):
    """Require an error of exactly this kind, saying exactly this."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    assert str(caught.value) == sentence
