# SPDX-License-Identifier: Apache-2.0
"""Elementary functions of float32 expressions as polynomials: LLVM keeps them in vector registers, calls of libm it does not.

Every function takes a float32 expression, scalar or vector, and returns one of the same lanes, built from arithmetic,
comparisons and selects only, so it may stand in a `te.compute`, in a fused epilogue or in a hand-emitted kernel. Arguments
are repeated in the result: pass a load, not a deep expression. NaN arguments give NaN. Coefficients are minimax fits, made
for this file (linear programming on a dense grid, in float64).

Largest errors against float64 over the whole float32 range, special values included, with and without fused
multiply-add (`tests/schedules/test_vector_math.py` holds them to it):

    exp, log                         2 ulp (denormal results of exp included)
    exp_nonpositive                  2 ulp, 0 where the result would be denormal
    softmax_weight                   2 + |x| ulp, 0 below 1.2 times the smallest normal number
    erf, tanh                        8 and 9 ulp, 3e-7 and 5e-7 absolute; exactly +-1 where saturated
    gelu, gelu_tanh, softplus        4, 4 and 5 ulp of max(|x|, |result|)
    sigmoid, silu, mish              2, 2 and 3 ulp of max(|x|, |result|)
"""

from __future__ import annotations

import math

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.lanes import lanes_of

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # 9 bits: n * _LN2_HIGH is exact for |n| < 2^15
_LN2_LOW = math.log(2) - _LN2_HIGH
# Adding 1.5 * 2^23 to a small float leaves its nearest integer in the low bits of the sum.
_ROUND = 12582912.0
_ROUND_BITS = 0x4B400000
_MIN_NORMAL = 2.0**-126

# exp(r) = 1 + r + r^2 P(r), |r| <= ln2 / 2: 3.1e-9 relative.
_EXP = (0.49999993, 0.1666652, 0.0416684, 0.00836878, 0.00138142)
# exp(r) = 1 + r P(r), |r| <= ln2 / 2: 9.2e-8 relative.
_EXP_SHORT = (0.9999997, 0.49999148, 0.16667639, 0.04189816, 0.00829027)
# log(1 + f) = f - f^2 / 2 + f^3 P(f), sqrt(1/2) <= 1 + f < sqrt(2): 5.8e-9 relative.
_LOG = (
    0.33333332,
    -0.25000821,
    0.20001227,
    -0.16623357,
    0.14201758,
    -0.13160182,
    0.12761576,
    -0.07634496,
)
# log(1 + u) = u P(u) / Q(u), 0 <= u <= 1: 1.4e-9 relative.
_LOG1P_P = (1.0, 1.0675874948501587, 0.23900169134140015, 0.003445876995101571)
_LOG1P_Q = (1.0, 1.5675873756408691, 0.6894652247428894, 0.07562360912561417)
# erf(x) = x P(x^2) / Q(x^2), |x| <= 3.95: 3.3e-8 relative.
_ERF_P = (
    1.1283791065216064,
    0.18471132218837738,
    0.0519811175763607,
    0.003521289210766554,
    2.794298925437033e-4,
    2.09186100619263e-6,
)
_ERF_Q = (
    1.0,
    0.49702945351600647,
    0.11174344271421432,
    0.014474712312221527,
    0.0011036848882213235,
    3.8245150790316984e-5,
)
_ERF_ONE = 3.9192059040069580  # erf rounds to 1 from here
# tanh(x) = x P(x^2) / Q(x^2), |x| <= 9.1: 9.1e-8 relative.
_TANH_P = (
    0.9999998807907104,
    0.13336709141731262,
    0.003441633889451623,
    1.9671384507091716e-5,
    1.1976475811081855e-8,
)
_TANH_Q = (1.0, 0.4667004346847534, 0.025675153359770775, 3.1951750947978e-4, 7.228225058497628e-7)
_TANH_ONE = 9.0109130


def as_float32(x):
    """A vector or scalar of float32, or of integers as float32."""
    lanes = lanes_of(x)
    dtype = "float32" if lanes == 1 else f"float32x{lanes}"
    return x if str(x.ty.dtype) == dtype else x.astype(dtype)


def _constant(x, value: float, dtype: str = "float32"):
    """`value` with the lanes of `x`, rounded to float32 where it is one."""
    lanes = lanes_of(x)
    scalar = tirx.const(float(np.float32(value)) if dtype == "float32" else value, dtype)
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def _retyped(x, dtype: str):
    lanes = lanes_of(x)
    return tirx.reinterpret(dtype if lanes == 1 else f"{dtype}x{lanes}", x)


def _polynomial(x, coefficients) -> tirx.Expr:
    """Horner's scheme; coefficients from the constant term up."""
    *rest, result = [_constant(x, c) for c in coefficients]
    for c in reversed(rest):
        result = result * x + c
    return result


def maximum(x, bound: float):
    """max(x, bound) for a number `bound`; NaN stays NaN, unlike `tirx.max(x, bound)`."""
    # LLVM code for max(a, b) is `a > b ? a : b`: a NaN survives in second place only.
    return tirx.max(_constant(x, bound), x)


def minimum(x, bound: float):
    """min(x, bound) for a number `bound`; NaN stays NaN, unlike `tirx.min(x, bound)`."""
    return tirx.min(_constant(x, bound), x)


def relu(x):
    """max(x, 0); relu(NaN) is NaN and relu(-0) is -0, as in torch."""
    return maximum(x, 0.0)


def _power_of_two(exponent):
    """2^exponent as float32 from its biased-exponent bits; -126 <= exponent <= 127."""
    bits = tirx.shift_left(
        exponent + _constant(exponent, 127, "int32"), _constant(exponent, 23, "int32")
    )
    return _retyped(bits, "float32")


def _exp_parts(x):
    """exp(r) and the integer n, where x = n ln2 + r; |x| < 2^20."""
    rounded = x * _constant(x, _LOG2_E) + _constant(x, _ROUND)
    # Not `rounded - _ROUND`, which TVM would simplify away.
    n = _retyped(rounded, "int32") - _constant(x, _ROUND_BITS, "int32")
    r = x - as_float32(n) * _constant(x, _LN2_HIGH) - as_float32(n) * _constant(x, _LN2_LOW)
    return _polynomial(r, (1.0, 1.0, *_EXP)), n


def exp(x):
    """e^x for any x; overflow gives inf, gradual underflow is kept."""
    value, n = _exp_parts(minimum(maximum(x, -104.0), 89.0))
    half = tirx.shift_right(n, _constant(n, 1, "int32"))
    return value * _power_of_two(half) * _power_of_two(n - half)


def exp_nonpositive(x):
    """e^x for x <= 0 (or NaN), half the work of `exp`; results below the smallest normal number are 0."""
    lowest = _constant(x, -87.33654)
    value, n = _exp_parts(maximum(x, -87.33654))
    return tirx.Select(x < lowest, _constant(x, 0.0), value * _power_of_two(n))


def softmax_weight(x):
    """e^x for x <= 0 (or NaN) with the fewest instructions: 1 at 0, and exactly 0 below -87.7.

    The error grows with |x| as that of a difference of two scores does, which x is.
    """
    x = maximum(x, -127 * math.log(2))
    # The biased exponent in the low bits: 0 at the lowest x, which makes the factor 0.
    rounded = x * _constant(x, _LOG2_E) + _constant(x, _ROUND + 127)
    bits = _retyped(rounded, "int32")
    n = _retyped(bits, "float32") - _constant(x, _ROUND + 127)  # as integers, or TVM simplifies it
    r = x - n * _constant(x, math.log(2))
    power = _retyped(tirx.shift_left(bits, _constant(bits, 23, "int32")), "float32")
    return _polynomial(r, (1.0, *_EXP_SHORT)) * power


def log(x):
    """Natural logarithm: -inf at 0, NaN below, inf at inf; denormal arguments are exact."""
    tiny = x < _constant(x, _MIN_NORMAL)
    bits = _retyped(tirx.Select(tiny, x * _constant(x, 2.0**23), x), "int32")
    shift = _constant(bits, 23, "int32")
    e = tirx.shift_right(bits - _constant(bits, 0x3F3504F3, "int32"), shift)
    f = _retyped(bits - tirx.shift_left(e, shift), "float32") - _constant(x, 1.0)
    n = as_float32(e) - tirx.Select(tiny, _constant(x, 23.0), _constant(x, 0.0))
    square = f * f
    tail = (
        square * f * _polynomial(f, _LOG) - square * _constant(x, 0.5) + n * _constant(x, _LN2_LOW)
    )
    value = f + tail + n * _constant(x, _LN2_HIGH)
    infinity = _constant(x, math.inf)
    positive = tirx.Select(x < infinity, value, infinity)
    other = tirx.Select(x < _constant(x, 0.0), _constant(x, math.nan), _constant(x, -math.inf))
    return tirx.Select(
        x > _constant(x, 0.0), positive, tirx.Select(x <= _constant(x, 0.0), other, x)
    )


def _saturating(x, p, q, one_from: float):
    """x P(x^2) / Q(x^2), exactly +-1 from `one_from` on."""
    square = x * x
    value = x * _polynomial(square, p) / _polynomial(square, q)
    limit = _constant(x, one_from)
    return tirx.Select(
        x > limit, _constant(x, 1.0), tirx.Select(x < -limit, _constant(x, -1.0), value)
    )


def erf(x):
    """The error function; exactly +-1 where it rounds to that."""
    return _saturating(x, _ERF_P, _ERF_Q, _ERF_ONE)


def tanh(x):
    """Hyperbolic tangent; exactly +-1 where it rounds to that."""
    return _saturating(x, _TANH_P, _TANH_Q, _TANH_ONE)


def sigmoid(x):
    """1 / (1 + e^-x)."""
    one = _constant(x, 1.0)
    return one / (one + exp(-x))


def silu(x):
    """x / (1 + e^-x); NaN at -inf, as in torch."""
    return x / (_constant(x, 1.0) + exp(-x))


def gelu(x):
    """x (1 + erf(x / sqrt 2)) / 2; NaN at -inf, as in torch."""
    return _constant(x, 0.5) * x * (_constant(x, 1.0) + erf(x * _constant(x, math.sqrt(0.5))))


def gelu_tanh(x):
    """The tanh approximation of gelu: x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    inner = _constant(x, math.sqrt(2 / math.pi)) * (x + _constant(x, 0.044715) * x * x * x)
    return _constant(x, 0.5) * x * (_constant(x, 1.0) + tanh(inner))


def softplus(x, beta: float = 1.0, threshold: float = 20.0):
    """log(1 + e^(beta x)) / beta, and x itself where beta x > threshold."""
    scaled = x * _constant(x, beta)
    zero = _constant(x, 0.0)
    u = exp_nonpositive(tirx.Select(scaled > zero, -scaled, scaled))
    log1p = u * _polynomial(u, _LOG1P_P) / _polynomial(u, _LOG1P_Q)
    value = (maximum(scaled, 0.0) + log1p) * _constant(x, 1.0 / beta)
    return tirx.Select(scaled > _constant(x, threshold), x, value)


def mish(x):
    """x tanh(softplus(x)) = x (e^2 + 2e) / (e^2 + 2e + 2) with e = e^x."""
    e = exp(minimum(x, 30.0))
    numerator = e * (e + _constant(x, 2.0))
    return x * (numerator / (numerator + _constant(x, 2.0)))
