"""Which layers and losses have right products under which engine: measured, and written down in the docs as measured.

UPDATE_DOCS=1 pytest tests/test_coverage.py -k page      writes docs/coverage.md anew
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .kinds_of_layers import ALLOWED, ENGINES, EXCEPTIONS, LOSSES, NETWORKS, problem

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", [name for name in NETWORKS if name not in EXCEPTIONS])
def test_products_equal_finite_differences(network, loss):
    """On repeated calls, for every engine."""
    errors = {engine: error(problem(network, loss)) for engine, error in ENGINES.items()}
    assert {engine: error for engine, error in errors.items() if not error <= ALLOWED} == {}


@pytest.mark.parametrize("network", EXCEPTIONS)
def test_exceptions_are_still_needed(network):
    """Were they right one day, the page would have to say so."""
    assert not next(iter(ENGINES.values()))(problem(network, "MSE")) <= ALLOWED


def table() -> str:
    """The cells that the tests above have measured."""
    lines = [f"| layer | {' | '.join(ENGINES)} |", f"|---|{'---|' * len(ENGINES)}"]
    for network in NETWORKS:
        cell = "no, see below" if network in EXCEPTIONS else f"all {len(LOSSES)} losses"
        lines.append(f"| {network} | {' | '.join([cell] * len(ENGINES))} |")
    notes = [f"- **{network}**: {reason}" for network, reason in EXCEPTIONS.items()]
    return "\n".join([f"Losses: {', '.join(LOSSES)}.", "", *lines, "", *notes, ""])


def test_page_shows_what_was_measured():
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    written = f"{before}{BEGIN}{table()}{END}{after}"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(written)
    assert written == PAGE.read_text(), "the page differs from what is measured; run this test with UPDATE_DOCS=1"
