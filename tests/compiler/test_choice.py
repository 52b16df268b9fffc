# SPDX-License-Identifier: Apache-2.0
"""What stays compressed after timing: the faster of dense and compressed, by layer, by unit and as a whole."""

from __future__ import annotations

from dataclasses import replace

from compiler.choice import Times, revert, slower_layers, slower_network
from passes.treatment import Decision


def decision(layer, treatment="sparse", unit=None):
    return Decision(layer, "kerf.dense", (4, 4), "sparse", treatment, unit=unit)


def times(dense, compressed, rest=(0.0, 0.0)):
    total = {
        "dense": sum(dense.values()) + rest[0],
        "compressed": sum(compressed.values()) + rest[1],
    }
    return Times(total, {"dense": dense, "compressed": compressed})


def test_a_layer_that_is_not_faster_goes_back_and_says_both_times():
    found = times({"a": 10.0, "b": 20.0, "c": 5.0}, {"a": 4.0, "b": 20.0, "c": 9.0})
    assert slower_layers(found, [decision("a"), decision("b"), decision("c", "dense")]) == {
        "b": "sparse took 20 us, dense 20 us"
    }


def test_the_layers_of_a_unit_stand_or_fall_together():
    unit = [decision("up", unit="up"), decision("down", unit="up")]
    # One is slower, but the pair is faster.
    assert not slower_layers(times({"up": 9.0, "down": 9.0}, {"up": 12.0, "down": 1.0}), unit)
    # One is faster, but the pair is slower.
    found = slower_layers(times({"up": 9.0, "down": 9.0}, {"up": 18.0, "down": 1.0}), unit)
    assert set(found) == {"up", "down"} and "(up as a whole)" in found["up"]


def test_layers_that_one_kernel_computes_stand_or_fall_together():
    layers = [decision("last"), decision("shortcut"), decision("up", unit="up")]
    found = times({"last": 20.0, "shortcut": 8.0, "up": 5.0}, dict.fromkeys(["last", "shortcut", "up"], 9.0))  # fmt: skip
    assert set(slower_layers(found, layers)) == {"shortcut", "up"}
    shared = replace(found, together=[["last", "shortcut"], ["gone", "another"]])
    assert set(slower_layers(shared, layers)) == {"up"}
    # They belong to whatever units they were of.
    shared = replace(found, together=[["last", "shortcut"], ["shortcut", "up"]])
    assert not slower_layers(shared, layers)
    dense = [decision("last"), decision("shortcut", "dense")]
    assert not slower_layers(replace(found, together=[["last", "shortcut"]]), dense)


def test_what_works_for_a_unit_alone_counts_for_it():
    dense, compressed = {"r": 10.0, "g": 10.0, "b": 10.0}, {"r": 11.0, "g": 11.0, "b": 11.0}
    unit = [decision(name, "quadratic", unit="r") for name in "rgb"]
    square = {"dense": [(["b"], 2.0), (["r", "b"], 2.0), (["b", "other"], 50.0)]}
    found = Times({"dense": 84.0, "compressed": 33.0}, {"dense": dense, "compressed": compressed})
    assert set(slower_layers(found, unit)) == {"r", "g", "b"}
    assert not slower_layers(replace(found, served=square), unit)


def test_conversions_between_layers_count_for_the_network():
    layers = [decision("a"), decision("b", "dense")]
    dense, compressed = {"a": 10.0, "b": 5.0}, {"a": 6.0, "b": 5.0}
    assert not slower_network(times(dense, compressed, (1.0, 4.0)), layers)
    found = slower_network(times(dense, compressed, (1.0, 5.0)), layers)
    assert set(found) == {"a"} and "took 16 us, dense 16 us" in found["a"]


def test_a_reverted_decision_keeps_what_was_asked():
    old, new = decision("a"), Decision("a", "kerf.dense", (4, 4), "dense", "dense")
    kept = revert(old, new, {"a": "slower"})
    assert (kept.asked, kept.treatment, kept.declined) == ("sparse", "dense", "slower")
    assert revert(old, new, {}) is new
