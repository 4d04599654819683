"""Graphs of operations drawn at random, cut over random grids, beside themselves on one device.

A failure prints the graph and the line that reproduces it; GRAPHS=500 in the environment runs more of them, FIRST_GRAPH=10000
others.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
from zoo.graphs import Draw
from zoo.random_graphs import outcome, run

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of what graphs do

PARTS = 4  # tests, which several workers share
EACH = int(os.environ.get("GRAPHS", 40)) // PARTS
FIRST = int(os.environ.get("FIRST_GRAPH", 0))


@pytest.mark.parametrize("part", range(PARTS))
def test_cut_over_grids(part: int) -> None:
    first = FIRST + EACH * part
    outcomes = Counter(run(number) for number in range(first, first + EACH))
    print(f"from {first} on: {dict(outcomes)}")
    refused = sum(n for name, n in outcomes.items() if "refuse" in name)
    assert refused <= EACH // 5 + 2, outcomes


PAST = (
    "torch.ones_like({0})",
    "{0}.new_full((2, 3), 2.0)",
    "torch.linspace(0, 1, 5, dtype={0}.dtype) + {0}",
    "({0} > 0).to({0}.dtype)",
    "F.adaptive_avg_pool1d({0}, 1).flatten(1)",
)


@pytest.mark.parametrize("text", PAST)
def test_past_faults(text: str) -> None:
    d = Draw(0)
    d.inputs = [d.randn(2, 4, 5)]
    d.values = [*d.inputs]
    assert d.evaluate(text, 0)
    d.net.returns = (1,)
    assert outcome(d.net, d.inputs, (1, 1, 2), None) == "equal"
