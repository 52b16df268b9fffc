# SPDX-License-Identifier: Apache-2.0
"""TVM's thread pool: how many threads a call uses, without TVM binding anything to a core behind
our back.

The pool is made at its first use in a thread, its size read from the environment then; after that
only the number of workers in use can change. Left alone it counts half the cores and binds the
calling thread to core 0, which would also slow down every other engine in the process.
"""

from __future__ import annotations

import functools
import os

from schedules.errors import UserError
from schedules.target import usable_cores


def check_threads(threads: int, built_for: int | None = None) -> int:
    """`threads` if it can be used here; raises UserError. `built_for`: threads of an artifact's
    kernels."""
    if not isinstance(threads, int) or threads < 1:
        raise UserError(
            "not a number of threads", where="threads", found=repr(threads), wanted="1 or more"
        )
    if threads > usable_cores():
        raise UserError(
            "more threads than usable cores",
            where="threads",
            found=str(threads),
            wanted=f"at most {usable_cores()}",
        )
    if built_for is not None and threads > built_for:
        raise UserError(
            "more threads than the kernels were built for",
            where="threads",
            found=str(threads),
            wanted=f"at most {built_for}",
            todo=f"Build with --threads {threads}",
        )
    return threads


def prepare_thread_pool() -> None:
    """Let TVM's pool, once it is made, have a thread per usable core, unbound. Call before the
    first kernel runs."""
    os.environ["TVM_BIND_THREADS"] = "0"
    if os.environ.get("TVM_NUM_THREADS", "") != str(usable_cores()):
        os.environ["TVM_NUM_THREADS"] = str(usable_cores())


@functools.cache
def _config():
    import tvm

    return tvm.get_global_func("runtime.config_threadpool")


def use_threads(threads: int) -> None:
    """From now on parallel kernels called from this thread use `threads` threads. Costs under a
    microsecond."""
    _config()(1, threads)


def threads_in_use() -> int:
    """Threads that a parallel kernel called from this thread would use."""
    import tvm

    return int(tvm.runtime.num_threads())
