# SPDX-License-Identifier: Apache-2.0
"""Which tensors lie in planes, and the function rewritten with these: the planner behind `keep_planes`.

The sparse kernels multiply planes. Channels last, they transpose what they read and what they write, which takes as long as
a sparse layer's multiplications. A value keeps its layout unless all its readers take planes, and all that it is computed from
is either written in planes or has one number per channel.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax

from passes.channels_last import ELEMENTWISE, TO_LAST
from passes.layers import (
    attrs_of,
    const_array,
    is_call,
    is_const,
    is_elementwise,
    operator_call,
    shape_of,
)
from passes.rewriting import (
    Graph,
    axes_of,
    bindings_of,
    constant,
    permutation,
    variables,
)
from passes.sparse.operators import (
    SPARSE_CONV2D,
    SPARSE_DENSE,
    SPARSE_POOLED_CONV2D,
    in_planes,
    mean_of_planes,
    planes_shape,
    together_of,
)
from schedules import sparse_groups

# Pixels of an image, or rows of a matrix, below which a plane does not fill a vector of the widest target.
FEWEST_PIXELS = 16
# Kernels copy planes line by line where a kernel or a stride is larger than one.
_SHORTEST_LINE, _LARGEST_STRIDE = 4, 2


def _pixels(shape: tuple[int, ...]) -> int:
    """Pixels of an image channels last, rows of a matrix."""
    return math.prod(shape[1:-1]) if len(shape) == 4 else math.prod(shape[:-1])


def is_sparse(value) -> bool:
    """Whether a value is a sparse layer, of floats or of bytes."""
    if any(is_call(value, op) for op in (SPARSE_CONV2D, SPARSE_DENSE, SPARSE_POOLED_CONV2D)):
        return True
    return is_integer(value) and "grain" in attrs_of(value)


def is_integer(value) -> bool:
    """Whether a value is a layer of bytes."""
    return together_of(value) > 1 and len(value.args) > 1


def _is_integer_mean(value) -> bool:
    """Whether a value is a mean of bytes over windows."""
    return together_of(value) > 1 and len(value.args) == 1


def _is_matrix_product(call: relax.Call) -> bool:
    return len(shape_of(call.args[1])) == 2


def _is_one_image(shape: tuple[int, ...]) -> bool:
    """Whether the planes of a matrix product's rows are those of an image, or not of images at all."""
    return len(shape) != 4 or shape[0] == 1


def _is_elementwise(value) -> bool:
    if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
        return False
    return value.op.name in ELEMENTWISE or is_elementwise(value)


def is_tensor(expr) -> bool:
    return isinstance(expr.ty, relax.TensorType)


def _is_of_few_channels(call: relax.Call) -> bool:
    """Whether a convolution's windows are over few channels."""
    larger = math.prod(shape_of(call.args[1])[2:]) > 1
    groups, inputs = attrs_of(call).get("groups", 1), shape_of(call.args[0])[-1]
    return larger and sparse_groups.few_channels(groups, inputs)


def _must_read_planes(call: relax.Call) -> bool:
    """Whether a sparse layer that writes planes is to read them, too: windows of single elements are packed tap by tap else."""
    if is_integer(call) or attrs_of(call)["grain"] != "element" or _is_of_few_channels(call):
        return False
    return math.prod(shape_of(call.args[1])[2:]) > 1


def _reads_planes(call: relax.Call) -> bool:
    """Whether a sparse layer is to read planes if its input may lie in them."""
    shape = shape_of(call.args[0])
    if shape_of(call.args[1])[1] % together_of(call):
        return False
    if _is_matrix_product(call):
        return _pixels(shape) >= FEWEST_PIXELS and _is_one_image(shape)
    return _fits_lines(call)


def _fits_lines(call: relax.Call) -> bool:
    """Whether a convolution's planes are worth copying line by line."""
    return (
        _pixels(shape_of(call)) >= FEWEST_PIXELS
        and shape_of(call.args[0])[2] >= _SHORTEST_LINE
        and max(attrs_of(call)["strides"]) <= _LARGEST_STRIDE
    )


def _is_part_of_quad(call: relax.Call) -> bool:
    """Whether windows are over an image of fewer channels than a quad has."""
    return (
        shape_of(call.args[0])[-1] < together_of(call) and math.prod(shape_of(call.args[1])[2:]) > 1
    )


def _writes_planes(call: relax.Call) -> bool:
    """Whether a sparse layer may write planes."""
    if _is_matrix_product(call) and not _is_one_image(shape_of(call)):
        return False
    return shape_of(call)[-1] % together_of(call) == 0


def _is_mean_over_pixels(call, shape: tuple[int, ...]) -> bool:
    if _is_integer_mean(call):
        attrs = attrs_of(call)
        return tuple(attrs["pool_size"]) == shape[1:3] and not any(attrs["padding"])
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


class Planner:
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
        self.together: dict[relax.Var, int] = {}  # channels that a plane of a variable would hold
        for var, value in self.values.items():
            if found := self._considered(var, value):
                self.together[var] = found
        self.planes = {v for v, value in self.values.items() if self._may_lie_in_planes(v, value)}
        while dropped := {v for v in self.planes if not self._fits(v)}:
            self.planes -= dropped

    def _considered(self, _var: relax.Var, value) -> int | None:
        """Channels of a plane that a variable would hold; None if it cannot lie in planes."""
        return self._together(value)

    def _together(self, value) -> int | None:
        """Channels of a plane that a value would be written in; None if it cannot be."""
        if is_sparse(value):
            return together_of(value)
        if not _is_elementwise(value):
            return None
        found = {self.together[v] for v in variables(value) if v in self.together}
        return found.pop() if len(found) == 1 else None

    def _may_lie_in_planes(self, var: relax.Var, value) -> bool:
        if var in self.outputs or not is_tensor(var) or _pixels(shape_of(var)) < FEWEST_PIXELS:
            return False
        return _writes_planes(value) if is_sparse(value) else var in self.together

    def _fits(self, var: relax.Var) -> bool:
        """Whether a variable can lie in planes while all the others do that still are to."""
        value = self.values[var]
        if is_sparse(value):
            if _must_read_planes(value) and value.args[0] not in self.planes:
                return False
        elif not self._is_computed_from_planes(value, shape_of(var)):
            return False
        return all(self._takes_planes(var, reader, read) for reader, read in self._readers(var))

    def _readers(self, var: relax.Var):
        return self.readers.get(var, [])

    def _is_computed_from_planes(self, value: relax.Call, shape: tuple[int, ...]) -> bool:
        operands = [a for a in value.args if is_tensor(a)]
        large = [a for a in operands if isinstance(a, relax.Var) and a in self.planes]
        if not any(shape_of(a) == shape for a in large):
            return False
        return all(
            shape_of(a) == shape if a in large else _is_of_channels(a, shape) for a in operands
        )

    def _takes_planes(self, var: relax.Var, reader: relax.Var, read) -> bool:
        if is_sparse(read):
            return _reads_planes(read) and self._together(read) == self.together[var]
        if _is_mean_over_pixels(read, shape_of(var)):
            return is_call(read, "relax.mean") or self.together[var] == together_of(read)
        return reader in self.planes and shape_of(reader) == shape_of(var)

    def run(self) -> relax.Function:
        graph = Graph(self.func)
        for binding in self.bindings:
            value = self._rewritten(graph, binding.var, binding.value)
            self._place(graph, binding.var, graph.bind(binding.var.name, value))
        return graph.finish(self.func)

    def _place(self, graph: Graph, var: relax.Var, new: relax.Var) -> None:
        """Let `new`, in the layout decided for `var`, stand for it."""
        graph.alias(var, new)

    def _planar(self, graph: Graph, expr: relax.Expr) -> relax.Expr:
        """What stands for an operand that lies in planes."""
        return graph.substitute(expr)

    def _reads(self, value: relax.Call) -> bool:
        """Whether a call is to read planes."""
        return any(isinstance(a, relax.Var) and a in self.planes for a in value.args)

    def _rewritten(self, graph: Graph, var: relax.Var, value) -> relax.Expr:
        if not isinstance(value, relax.Call):
            return graph.substitute(value)
        reads = self._reads(value)
        if (image := self._image_in_planes(value)) is not None:
            x = graph.substitute(image)
            if not is_integer(value):
                shape = planes_shape(*shape_of(image)[:2], math.prod(shape_of(image)[2:]))
                x = relax.op.reshape(x, shape)
            return in_planes(value, x, True, var in self.planes)
        if not reads and var not in self.planes:
            return graph.substitute(value)
        if is_sparse(value):
            given = value.args[0]
            x = self._planar(graph, given) if reads else graph.substitute(given)
            return in_planes(value, x, reads, var in self.planes)
        if var in self.planes:
            shape, together = shape_of(var), self.together[var]
            args = [self._operand(graph, a, shape, together) for a in value.args]
            return relax.Call(value.op, args, value.attrs, value.ty_args)
        if _is_integer_mean(value):
            attrs = attrs_of(value) | {"image": list(shape_of(value.args[0])[:3])}
            return operator_call(value.op.name, [graph.substitute(value.args[0])], **attrs)
        x = graph.substitute(value.args[0])
        if self.together[value.args[0]] == 1:
            mean = mean_of_planes(x, _pixels(shape_of(value.args[0])))
        else:
            mean = relax.op.mean(x, [2], bool(value.attrs.keepdims))
        return relax.op.reshape(mean, shape_of(var))

    def _image_in_planes(self, value: relax.Call) -> relax.Var | None:
        """The tensor [N, C, H, W] that a sparse layer's few channels were made channels last from, if it is to read that; for a
        layer of bytes the image [N, H, W, C] whose channels fill no quad: its lowering makes one plane of it."""
        if not is_sparse(value) or _is_matrix_product(value):
            return None
        if is_integer(value):
            return value.args[0] if _is_part_of_quad(value) and _fits_lines(value) else None
        moved = self.values.get(value.args[0])
        if not is_call(moved, "relax.permute_dims") or tuple(permutation(moved)) != TO_LAST:
            return None
        few = sparse_groups.few_channels(1, shape_of(value.args[0])[-1])
        image = moved.args[0]
        return image if few and _reads_planes(value) and isinstance(image, relax.Var) else None

    def _operand(
        self, graph: Graph, expr: relax.Expr, shape: tuple[int, ...], together: int
    ) -> relax.Expr:
        """An operand of an elementwise operator, as its result in planes needs it."""
        if isinstance(expr, relax.Var) and expr in self.planes:
            return self._planar(graph, expr)
        if not is_tensor(expr):
            return graph.substitute(expr)
        own = shape_of(expr)
        if not own:
            return graph.substitute(expr)
        images = own[0] if len(own) == len(shape) == 4 else 1
        if own[-1] == 1:  # one number for all channels
            wanted = (images, 1, 1) if together == 1 else (images, 1, 1, 1)
        else:
            wanted = planes_shape(images, own[-1], 1, together)
        if is_const(expr):
            return constant(const_array(expr).reshape(wanted))
        return relax.op.reshape(graph.substitute(expr), wanted)
