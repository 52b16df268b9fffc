# SPDX-License-Identifier: Apache-2.0
"""Signs as bits, in numpy: packing of weights, and the words of constants."""

from __future__ import annotations

import numpy as np

from schedules.bit_words import WORD_BITS, words_for


def pack_bits(bits: np.ndarray, axis: int, groups: int = 1) -> np.ndarray:
    """Truth values as uint32 words along `axis`, each of `groups` equal parts beginning with a word of its own."""
    moved = np.moveaxis(np.asarray(bits, bool), axis, -1)
    lead, channels = moved.shape[:-1], moved.shape[-1]
    per_group = channels // groups
    words = words_for(per_group)
    full = np.zeros((*lead, groups, words * WORD_BITS), np.uint32)
    full[..., :per_group] = moved.reshape(*lead, groups, per_group)
    places = np.uint32(1) << np.arange(WORD_BITS, dtype=np.uint32)
    packed = (full.reshape(*lead, groups * words, WORD_BITS) * places).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis))


def unpack_bits(words: np.ndarray, axis: int, channels: int, groups: int = 1) -> np.ndarray:
    """The inverse of `pack_bits`: truth values of `channels` channels along `axis`."""
    moved = np.moveaxis(np.asarray(words, np.uint32), axis, -1)
    places = np.arange(WORD_BITS, dtype=np.uint32)
    bits = (moved[..., None] >> places) & np.uint32(1)
    bits = bits.reshape(*moved.shape[:-1], groups, -1)[..., : channels // groups]
    return np.moveaxis(bits.reshape(*moved.shape[:-1], channels).astype(bool), -1, axis)


def with_parities(words: np.ndarray, axis: int, run: int) -> np.ndarray:
    """`words` in runs along `axis`: every second one of a run becomes the parity, bit by bit, of the run up to it."""
    moved = np.moveaxis(words, axis, 0)
    found = moved.copy()
    for first in range(0, len(moved), run):
        parities = np.bitwise_xor.accumulate(moved[first : first + run])
        found[first : first + run][1::2] = parities[1::2]
    return np.ascontiguousarray(np.moveaxis(found, 0, axis))
