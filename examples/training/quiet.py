"""A terminal without the greetings of what is imported."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stderr_kept_back() -> Iterator[None]:
    """Show what is written to stderr only if an exception follows.

    TensorFlow greets from C++ at import, whatever the log level (tensorflow/tensorflow#100442).
    """
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(terminal, kept.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
