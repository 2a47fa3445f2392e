"""Pages in headless Chromium, without which tests skip, or fail by LMF_MULTI_REQUIRE_BROWSER."""

import os
import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
FLAGS += "--hide-scrollbars --disable-background-networking --disable-component-update "
FLAGS += "--enable-logging=stderr"


def visit(folder, page, scheme="light", *, width=800, fragment="", patience=0):
    """The page's own text after its scripts have run, and what its console says.

    Its other files, if it has any, are in ``folder``; ``patience`` is for scripts that wait, in
    seconds of the page's clock, which runs ahead when there is nothing to do.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        absent = pytest.fail if "LMF_MULTI_REQUIRE_BROWSER" in os.environ else pytest.skip
        absent("Chromium is not installed")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [browser, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]
    command += [f"--window-size={width},600"]
    command += [f"--virtual-time-budget={1000 * patience}"] if patience else []
    done = subprocess.run(
        [*command, file.as_uri() + fragment],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
