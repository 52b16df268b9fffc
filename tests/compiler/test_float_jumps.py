# SPDX-License-Identifier: Apache-2.0
"""Thresholds in verification: a value may fall on either side of one only where rounding could have put it there."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.jumps import Replay
from passes.activation_sparse.reference import cut

ATTRS = {"threshold": 0.5}


def judge(before: np.ndarray, written: np.ndarray):
    """The steps of a kernel that wrote `written` (float32) where float64 has `before` ahead of the threshold."""
    decoy = np.ones_like(written)
    replay = Replay([decoy, written], terms=16.0)
    exact = replay.exact(cut)(ATTRS, before)
    plain = replay.plain(cut)(ATTRS, before.astype(np.float32))
    assert exact is not None and plain is not None
    return sum(replay.steps[1:], replay.steps[0])


@pytest.fixture
def before(rng):
    values = rng.standard_normal((6, 40))
    values[np.abs(np.abs(values) - 0.5) < 1e-3] = 0.1
    values[2, 7] = 0.5 + 1e-9  # rounding decides
    return values


def test_the_same_values_pass(before):
    found = judge(before, cut(ATTRS, before).astype(np.float32))
    assert (found.tensors, found.elements, found.wrong, found.ties) == (1, 240, 0, 0)


def test_a_value_at_the_threshold_may_be_dropped(before):
    written = cut(ATTRS, before).astype(np.float32)
    written[2, 7] = 0.0
    found = judge(before, written)
    assert (found.wrong, found.ties) == (0, 1)


@pytest.mark.parametrize("value", [0.0, 0.9])
def test_another_value_may_not(before, value):
    """Dropped although it is large, or kept as another number."""
    written = cut(ATTRS, before).astype(np.float32)
    before[3, 3] = 0.8
    written[3, 3] = value
    assert judge(before, written).wrong == 1
