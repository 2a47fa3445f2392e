"""Other packages' losses against ours and 50-digit arithmetic; what docs/other-losses.md says."""

import numpy as np
import pytest

from tests.interop import peers

RTOL = 1e-5  # float32


@pytest.mark.parametrize("package, loss", peers.AGREEMENTS)
def test_equal_where_the_definitions_coincide(package, loss):
    pairs, dtype = peers.AGREEMENTS[package, loss]
    errors = {pair.case: peers.disagreement(pair, dtype) for pair in pairs()}
    assert errors
    tolerance = peers.TOLERANCES[dtype]
    assert not {case: error for case, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize("changed", [{"scale": 1.001}, {"margins": [1e-3, 0.0, 0.0]}], ids=str)
def test_another_loss_is_not_equal(changed):
    pairs, dtype = peers.AGREEMENTS["PyTorch", "cross_entropy"]
    pair = next(pairs())
    pair.ours.keywords.update(changed)
    assert peers.disagreement(pair, dtype) > 1e-4


@pytest.mark.parametrize("row", peers.ROWS, ids=lambda row: row.measure.__name__)
def test_ours_is_exact_where_a_peer_is_not(row):
    exact, ours, theirs = row.measure()
    numbers = f"exact {exact}, ours {ours}, {row.peer} {theirs}"
    print(numbers)
    assert peers.right(ours, exact, RTOL), numbers


def test_a_wrong_number_is_not_right():
    assert not peers.right(1.0 + 2e-5, 1.0, RTOL)
    assert not peers.right(1e-9, 0.0, RTOL)
    assert not peers.right(np.nan, 1.0, RTOL)
    assert not peers.right(1.0, None, RTOL)


def test_the_page_says_what_was_measured():
    """But for the versions, so that a release in which nothing changed breaks nothing."""
    written, measured = (
        peers.without_versions(lines) for lines in (peers.in_page(), peers.table())
    )
    assert written == measured, "docs/other-losses.md is out of date; run: nox -s peers"
    assert sum(line.startswith("| ") for line in written) == len(peers.ROWS) + 1


def test_every_version_is_named():
    (line,) = [line for line in peers.in_page() if line.startswith(peers.VERSIONS)]
    assert all(f"{package} " in line for package in peers.PACKAGES)
