# SPDX-License-Identifier: Apache-2.0
"""What the converters share: refusing, dtypes, constants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import tvm
from tvm import relax

from schedules.errors import ModelError


class Refused(Exception):
    """Arguments that a converter does not cover; the importer turns it into UnsupportedModel, naming the node."""


@contextmanager
def main_function(builder: relax.BlockBuilder, params: Sequence[relax.Var]) -> Iterator[None]:
    """`builder.function("main", params)`, quiet when left by an exception: TVM's own leaves a block
    open then, and a warning on standard error when the builder goes."""
    try:
        with builder.function("main", list(params)):
            yield
    except BaseException:
        builder._end_block()
        raise


def constant(array: np.ndarray) -> relax.Expr:
    """A Relax constant of exactly this dtype (`relax.const` of an array narrows int64)."""
    return relax.const(tvm.runtime.tensor(np.asarray(array, order="C")))


def dtype_of(expr: relax.Expr) -> str:
    return str(expr.ty.dtype.dtype)


def number(value: float, like: relax.Expr) -> relax.Expr:
    """A scalar of another expression's dtype."""
    return constant(np.array(value, dtype_of(like)))


def is_bool(expr: relax.Expr) -> bool:
    return dtype_of(expr) == "bool"


def first_line(error: BaseException, limit: int = 300) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:limit]


def require_known(given: Iterable[str], inputs: Sequence[str], where: str) -> None:
    """Raise ModelError for names that are none of the model's inputs."""
    if unknown := sorted(set(given) - set(inputs)):
        raise ModelError(
            "no such input",
            where=where,
            found=", ".join(unknown),
            wanted=f"one of {', '.join(inputs)}",
        )
