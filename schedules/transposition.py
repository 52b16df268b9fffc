# SPDX-License-Identifier: Apache-2.0
"""A matrix turned about its diagonal, cut or extended: definition and kernel.

    y[0, j, i] = x[min(i, I - 1), j]          x [..., I, J'], y [1, J, I'], J <= J'

Where I' exceeds I the last row of x is repeated. Square blocks of a vector's lanes are transposed in registers; the last ones
overlap those before.
"""

from __future__ import annotations

import math

from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules.emission import loop, ramp, runs_parallel, transpose, widest_lanes
from schedules.fused import Fused, annotations
from schedules.target import CpuTarget

LOOPS = "transposition"


def define_transposition(x, rows: int, columns: int):
    """te: x [..., I, J'], whose leading axes and I are taken together, -> [1, rows, columns], float32."""
    leading = [int(d) for d in x.shape[:-1]]

    def element(_, j, i):
        row = te.min(i, math.prod(leading) - 1)
        at = []
        for extent in reversed(leading):
            at.append(row % extent)
            row = row // extent
        return x(*reversed(at), j)

    notes = annotations(LOOPS)
    return te.compute((1, rows, columns), element, name="transposition", attrs=notes)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused transposition."""
    _, rows, columns = fused.shape
    lanes = widest_lanes(min(rows, columns), target.lanes)
    down, along = -(-rows // lanes), -(-columns // lanes)
    with fused.emit() as kernel:
        shape = [int(d) for d in kernel.inputs[0].shape]
        height = math.prod(shape[:-1])
        x = T.decl_buffer((height, shape[-1]), "float32", data=kernel.inputs[0].data)
        parallel = runs_parallel(target, along, rows * columns)
        with loop(along, parallel=parallel) as across, T.serial(0, down) as block:
            i = T.bind(tirx.min(across * lanes, columns - lanes).astype("int32"))
            j = T.bind(tirx.min(block * lanes, rows - lanes).astype("int32"))
            transpose(
                lanes,
                lambda r: x[tirx.min(i + r, height - 1), ramp(j, lanes)],
                lambda r, column: kernel.store(column, [0, j + r, ramp(i, lanes)]),
            )
    return kernel.func
