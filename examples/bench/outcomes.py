"""A pytest plugin that writes each test's outcome at once: ``-p examples.bench.outcomes``.

A run that is stopped for its time leaves what it has shown so far, in the file that OUTCOMES names.
"""

import json
import os


def pytest_configure(config: object) -> None:
    """Of xdist's processes only the one writes that began the others, which report to it."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.unregister(name=__name__)


def pytest_runtest_logreport(report: object) -> None:
    """A line of JSON for each test, and for what fails before or after it."""
    if report.when == "call" or report.outcome != "passed":
        tell(report)


def pytest_collectreport(report: object) -> None:
    """A file that cannot be imported."""
    if report.failed:
        tell(report)


def tell(report: object) -> None:
    """Its name, its outcome and the last line of what it says."""
    lines = str(report.longrepr or "").strip().splitlines()
    found = {"test": report.nodeid, "outcome": report.outcome, "why": "".join(lines[-1:])[:300]}
    with open(os.environ["OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
