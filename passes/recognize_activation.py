# SPDX-License-Identifier: Apache-2.0
"""Put activations that an exporter spelled out back together.

rewrite: x * (1 + erf(x / sqrt(2))) * 0.5                              ->  gelu(x)
         0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))  ->  gelu_tanh(x)
         x * sigmoid(x)                                                ->  silu(x)
requires: constants folded; one-element constants are scalars
ensures: in whatever order and grouping the factors were written; a factor that anything else reads
  stays, and so does a product with other constants
"""

from __future__ import annotations

import math

import tvm
from tvm import relax

from passes.layers import is_call, shape_of
from passes.rewriting import Graph, rewrite_function, rewrite_module, scalar

# Exporters round these constants to float32 and divide or multiply by them.
_TOLERANCE = 1e-5


def _is_near(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= _TOLERANCE * abs(wanted)


def factors(expr: relax.Expr, graph: Graph, root: bool = True) -> tuple[float, list[relax.Expr]]:
    """A tree of products as its scalar coefficient and its other factors; what others read too is
    not opened.
    """
    value = graph.definition(expr)
    if (constant := scalar(expr)) is not None:
        return constant, []
    opened = root or graph.is_read_once(expr)
    if value is not None and opened:
        if is_call(value, "relax.multiply"):
            (a, left), (b, right) = (factors(arg, graph, False) for arg in value.args)
            return a * b, left + right
        if is_call(value, "relax.divide") and (divisor := scalar(value.args[1])):
            a, left = factors(value.args[0], graph, False)
            return a / divisor, left
        if is_call(value, "relax.square"):
            a, left = factors(value.args[0], graph, False)
            return a * a, left * 2
        if is_call(value, "relax.power") and (exponent := scalar(value.args[1])) in (2.0, 3.0):
            a, left = factors(value.args[0], graph, False)
            return a**exponent, left * int(exponent)
    return 1.0, [expr]


def _plus_one(expr: relax.Expr, graph: Graph) -> relax.Expr | None:
    """y of 1 + y."""
    value = graph.call(expr, "relax.add")
    if value is None:
        return None
    left, right = value.args
    return left if scalar(right) == 1 else right if scalar(left) == 1 else None


def _same(a: relax.Expr, b: relax.Expr) -> bool:
    return a.same_as(b)


def recognize_gelu(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """Both forms of GELU, from the product that ends them."""
    if not is_call(value, "relax.multiply") and not is_call(value, "relax.divide"):
        return None
    coefficient, found = factors(value, graph)
    if len(found) != 2 or not _is_near(coefficient, 0.5):
        return None
    for x, other in (found, found[::-1]):
        inner = _plus_one(other, graph)
        if inner is None or shape_of(x) != shape_of(value):
            continue
        if (erf := graph.call(inner, "relax.erf")) is not None:
            scale, of = factors(erf.args[0], graph)
            if _is_near(scale, math.sqrt(0.5)) and len(of) == 1 and _same(of[0], x):
                return relax.op.nn.gelu(x)
        if (tanh := graph.call(inner, "relax.tanh")) is not None and _is_tanh_argument(
            tanh.args[0], x, graph
        ):
            return relax.op.nn.gelu_tanh(x)
    return None


def _is_tanh_argument(expr: relax.Expr, x: relax.Expr, graph: Graph) -> bool:
    """sqrt(2/pi) * (x + 0.044715 * x**3), or with x taken out of the sum."""
    scale, found = factors(expr, graph)
    if not _is_near(scale, math.sqrt(2 / math.pi)):
        return False
    if len(found) == 1 and (total := graph.call(found[0], "relax.add")) is not None:
        return any(
            _same(a, x) and _is_power(b, x, 3, graph)
            for a, b in (list(total.args), list(total.args)[::-1])
        )
    if len(found) == 2:
        for a, b in (found, found[::-1]):
            inner = _plus_one(b, graph)
            if inner is not None and _same(a, x) and _is_power(inner, x, 2, graph):
                return True
    return False


def _is_power(expr: relax.Expr, x: relax.Expr, exponent: int, graph: Graph) -> bool:
    scale, found = factors(expr, graph)
    return _is_near(scale, 0.044715) and len(found) == exponent and all(_same(f, x) for f in found)


def recognize_silu(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """x * sigmoid(x) -> silu(x)"""
    if not is_call(value, "relax.multiply"):
        return None
    for x, other in (list(value.args), list(value.args)[::-1]):
        sigmoid = graph.call(other, "relax.sigmoid")
        if sigmoid is not None and _same(sigmoid.args[0], x) and graph.is_read_once(other):
            return relax.op.nn.silu(x)
    return None


@tvm.transform.module_pass(opt_level=0, name="kerf.RecognizeActivation")
class RecognizeActivation:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(
            mod, lambda func: rewrite_function(func, (recognize_gelu, recognize_silu))
        )
