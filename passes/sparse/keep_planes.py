# SPDX-License-Identifier: Apache-2.0
"""Keep activations in planes, one per channel, where sparse layers hand them to one another.

    rewrite: y = kerf.sparse_conv2d(x, w1); z = relu(y + b); kerf.sparse_conv2d(z, w2)
             ->  the same with y and z [N, C, H * W] instead of [N, H, W, C]
    requires: channels last
    ensures: what lies in planes is written and read by sparse layers, elementwise operators and means over pixels only

The sparse kernels multiply planes. Channels last, they transpose what they read and what they write, which takes as long as
a sparse layer's multiplications. A value keeps its layout unless all its readers take planes, and all that it is computed from
is either written in planes or has one number per channel.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax

from passes.channels_last import ELEMENTWISE
from passes.layers import attrs_of, const_array, is_call, is_const, is_elementwise, shape_of
from passes.rewriting import (
    Graph,
    axes_of,
    bindings_of,
    constant,
    rewrite_module,
    variables,
)
from passes.sparse.operators import SPARSE_CONV2D, SPARSE_DENSE, in_planes

# Pixels of an image, or rows of a matrix, below which a plane does not fill a vector of the widest target.
_FEWEST_PIXELS = 16
# One output channel alone uses each line of a panel too little for long panels: beyond this many pixels, and for kernels
# larger than 1x1, it is faster channels last (measured on Cascade Lake).
_MOST_PIXELS_OF_ELEMENTS = 1024
# Kernels copy planes line by line where a kernel or a stride is larger than one.
_SHORTEST_LINE, _LARGEST_STRIDE = 4, 2


def _pixels(shape: tuple[int, ...]) -> int:
    """Pixels of an image channels last, rows of a matrix."""
    return math.prod(shape[1:-1]) if len(shape) == 4 else math.prod(shape[:-1])


def _is_sparse(value) -> bool:
    return is_call(value, SPARSE_CONV2D) or is_call(value, SPARSE_DENSE)


def _is_elementwise(value) -> bool:
    if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
        return False
    return value.op.name in ELEMENTWISE or is_elementwise(value)


def _is_tensor(expr) -> bool:
    return isinstance(expr.ty, relax.TensorType)


def _gains(call: relax.Call) -> bool:
    """Whether a sparse layer is faster with planes."""
    if attrs_of(call)["grain"] != "element":
        return True
    taps = math.prod(shape_of(call.args[1])[2:])
    return taps == 1 and _pixels(shape_of(call)) <= _MOST_PIXELS_OF_ELEMENTS


def _reads_planes(call: relax.Call) -> bool:
    """Whether a sparse layer is to read planes if its input may lie in them."""
    shape = shape_of(call.args[0])
    if not _gains(call):
        return False
    if is_call(call, SPARSE_DENSE):
        return _pixels(shape) >= _FEWEST_PIXELS
    strides = attrs_of(call)["strides"]
    return (
        _pixels(shape_of(call)) >= _FEWEST_PIXELS
        and shape[2] >= _SHORTEST_LINE
        and max(strides) <= _LARGEST_STRIDE
    )


def _is_mean_over_pixels(call, shape: tuple[int, ...]) -> bool:
    return (
        is_call(call, "relax.mean")
        and len(shape) == 4
        and sorted(axes_of(call.attrs.axis, 4)) == [1, 2]
    )


def _is_of_channels(expr, shape: tuple[int, ...]) -> bool:
    """Whether an operand has one number per channel, one per image and channel, or a single one."""
    own = shape_of(expr)
    padded = (1,) * (len(shape) - len(own)) + own
    if len(own) > len(shape) or any(d != 1 for d in padded[1:-1]):
        return False
    return (
        not padded or padded[0] == 1 or (len(shape) == 4 and padded[0] == shape[0] and shape[0] > 1)
    )


class _Planner:
    """Decides which variables lie in planes, and rewrites the function with these."""

    def __init__(self, func: relax.Function):
        self.func = func
        self.bindings = bindings_of(func)
        self.values = {b.var: b.value for b in self.bindings}
        self.readers: dict[relax.Var, list[tuple[relax.Var, relax.Expr]]] = {}
        for b in self.bindings:
            for read in variables(b.value):
                self.readers.setdefault(read, []).append((b.var, b.value))
        self.outputs = set(variables(func.body.body))
        self.planes = {v for v, value in self.values.items() if self._may_lie_in_planes(v, value)}
        while dropped := {v for v in self.planes if not self._fits(v)}:
            self.planes -= dropped

    def _may_lie_in_planes(self, var: relax.Var, value) -> bool:
        if var in self.outputs or not _is_tensor(var) or _pixels(shape_of(var)) < _FEWEST_PIXELS:
            return False
        return _gains(value) if _is_sparse(value) else _is_elementwise(value)

    def _fits(self, var: relax.Var) -> bool:
        """Whether a variable can lie in planes while all the others do that still are to."""
        value = self.values[var]
        if not _is_sparse(value) and not self._is_computed_from_planes(value, shape_of(var)):
            return False
        return all(self._takes_planes(var, reader, read) for reader, read in self._readers(var))

    def _readers(self, var: relax.Var):
        return self.readers.get(var, [])

    def _is_computed_from_planes(self, value: relax.Call, shape: tuple[int, ...]) -> bool:
        operands = [a for a in value.args if _is_tensor(a)]
        large = [a for a in operands if isinstance(a, relax.Var) and a in self.planes]
        if not any(shape_of(a) == shape for a in large):
            return False
        return all(
            shape_of(a) == shape if a in large else _is_of_channels(a, shape) for a in operands
        )

    def _takes_planes(self, var: relax.Var, reader: relax.Var, read) -> bool:
        if _is_sparse(read):
            return _reads_planes(read)
        if _is_mean_over_pixels(read, shape_of(var)):
            return True
        return reader in self.planes and shape_of(reader) == shape_of(var)

    def run(self) -> relax.Function:
        graph = Graph(self.func)
        for binding in self.bindings:
            value = self._rewritten(graph, binding.var, binding.value)
            graph.alias(binding.var, graph.bind(binding.var.name, value))
        return graph.finish(self.func)

    def _rewritten(self, graph: Graph, var: relax.Var, value) -> relax.Expr:
        if not isinstance(value, relax.Call):
            return graph.substitute(value)
        reads = any(isinstance(a, relax.Var) and a in self.planes for a in value.args)
        if not reads and var not in self.planes:
            return graph.substitute(value)
        if _is_sparse(value):
            return in_planes(value, graph.substitute(value.args[0]), reads, var in self.planes)
        if var in self.planes:
            shape = shape_of(var)
            args = [self._operand(graph, a, shape) for a in value.args]
            return relax.Call(value.op, args, value.attrs, value.ty_args)
        mean = relax.op.mean(graph.substitute(value.args[0]), [2], bool(value.attrs.keepdims))
        return relax.op.reshape(mean, shape_of(var)) if value.attrs.keepdims else mean

    def _operand(self, graph: Graph, expr: relax.Expr, shape: tuple[int, ...]) -> relax.Expr:
        """An operand of an elementwise operator, as its result in planes needs it."""
        if not _is_tensor(expr) or (isinstance(expr, relax.Var) and expr in self.planes):
            return graph.substitute(expr)
        own = shape_of(expr)
        if not own:
            return graph.substitute(expr)
        wanted = (own[0] if len(own) == len(shape) == 4 else 1, own[-1], 1)
        if is_const(expr):
            return constant(const_array(expr).reshape(wanted))
        return relax.op.reshape(graph.substitute(expr), wanted)


@tvm.transform.module_pass(opt_level=0, name="kerf.KeepPlanes")
class KeepPlanes:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: _Planner(func).run())
