# SPDX-License-Identifier: Apache-2.0
"""Kernels that measure the machine itself: multiply-adds that never leave registers, and a
streaming read."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from schedules.target import CpuTarget


def fma_accumulators(target: CpuTarget) -> int:
    """Independent chains: enough to cover latency x issue width (5 x 2 on x86), within the register
    file."""
    return 24 if target.registers >= 32 else 12


def fma_probe(target: CpuTarget, steps: int) -> tirx.PrimFunc:
    """`main(x [1], out [threads * lanes])`: per thread, `steps` times `fma_accumulators` fused
    multiply-adds.

    Operations per call: threads * steps * accumulators * lanes * 2.
    """
    lanes, chains = target.lanes, fma_accumulators(target)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            x = T.arg("x", T.buffer((1,), "float32"))
            out = T.arg("out", T.buffer((target.threads * lanes,), "float32"))
            T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            with T.parallel(0, target.threads) as thread:
                acc = T.sblock_alloc_buffer((chains * lanes,), "float32", scope="local")
                # acc -> acc / 2 + x settles at 2 x: no overflow and no denormals, however many
                # steps.
                for k in range(chains):
                    start = T.broadcast(x[0] * T.float32(k), lanes)
                    T.buffer_store(acc, start, [T.ramp(k * lanes, 1, lanes)])
                with T.serial(0, steps):
                    for k in range(chains):
                        at = T.ramp(k * lanes, 1, lanes)
                        half = T.broadcast(T.float32(0.5), lanes)
                        step = _multiply_add(target, acc[at], half, T.broadcast(x[0], lanes))
                        T.buffer_store(acc, step, [at])
                total = acc[T.ramp(0, 1, lanes)]
                for k in range(1, chains):
                    total = total + acc[T.ramp(k * lanes, 1, lanes)]
                T.buffer_store(out, total, [T.ramp(thread * lanes, 1, lanes)])
    return builder.get()


def _multiply_add(target: CpuTarget, a, b, c):
    """a * b + c; fused where the target has the instruction (without it LLVM calls the C
    library)."""
    if target.has("fma") or target.tier == "neon":
        return tirx.call_llvm_pure_intrin(f"float32x{target.lanes}", "llvm.fma", a, b, c)
    return a * b + c


def read_probe(target: CpuTarget, elements: int) -> tirx.PrimFunc:
    """`main(x [threads * elements], out [threads * lanes])`: each thread adds up its part of x.

    Bytes per call: threads * elements * 4. `elements` must be a multiple of 8 * lanes.
    """
    lanes, chains = target.lanes, 8
    assert elements % (chains * lanes) == 0, elements
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            x = T.arg("x", T.buffer((target.threads * elements,), "float32"))
            out = T.arg("out", T.buffer((target.threads * lanes,), "float32"))
            T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            with T.parallel(0, target.threads) as thread:
                acc = T.sblock_alloc_buffer((chains * lanes,), "float32", scope="local")
                for k in range(chains):
                    zero = T.broadcast(T.float32(0), lanes)
                    T.buffer_store(acc, zero, [T.ramp(k * lanes, 1, lanes)])
                with T.serial(0, elements // (chains * lanes)) as i:
                    for k in range(chains):
                        at = T.ramp(k * lanes, 1, lanes)
                        base = thread * elements + i * (chains * lanes) + k * lanes
                        T.buffer_store(acc, acc[at] + x[T.ramp(base, 1, lanes)], [at])
                total = acc[T.ramp(0, 1, lanes)]
                for k in range(1, chains):
                    total = total + acc[T.ramp(k * lanes, 1, lanes)]
                T.buffer_store(out, total, [T.ramp(thread * lanes, 1, lanes)])
    return builder.get()
