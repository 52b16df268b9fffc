# SPDX-License-Identifier: Apache-2.0
"""Pooling over NHWC images: te definitions and lowerings."""

from __future__ import annotations

from passes.family import Lowering

LOWERINGS: dict[str, Lowering] = {}
