"""Exponential noise that is a function of a row's seed, a step and a token, and of nothing else."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd
# Shifts and factors of SplitMix64's finaliser: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators.
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
RANDOM_BITS = 63
UNIT = 2.0**-RANDOM_BITS * (1 - 2.0**-24)  # float32 rounds the largest numbers to 2^63, of which 2^-63 makes u = 1
AT_ONCE = 2**16  # numbers that are mixed together on a CPU, within its cache


def exponential_noise(seeds: Tensor, step: int, vocabulary: int) -> Tensor:
    r"""Return noise of a step for every row and token.

    .. math:: E_{r,v} = -\log(1 - u_{r,v}), \quad u_{r,v} = 2^{-63} m(m(s_r + g (t + 1)) + g (v + 1))

    with the seed :math:`s_r` of row r, the step t, the token v, :math:`g` the golden ratio of 64 bits and :math:`m` the
    finaliser of SplitMix64, whose lowest bit is dropped. A counter and no state: rows may come, go and move between
    processes, and each keeps its noise. On CUDA one Triton kernel computes all of it; its logarithm is rounded
    otherwise, by some 2e-6 of its value at most.

    Args:
        seeds: (n,) int64, one for each row.
        step: the number of the token, from 0.
        vocabulary: V, the number of tokens.

    Returns:
        (n, V) float32, Exponential(1), never 0, and never infinite: in float32 u is at most 1 - 2^-24. Near 0 in steps
        of 2^-63: the smallest clocks win, and from float32's own steps of 2^-24 tokens with a smaller probability would
        hardly be drawn.
    """
    keys = mix_(seeds + _signed(GOLDEN * (step + 1)))
    noise = torch.empty(len(keys), vocabulary, device=keys.device)
    if keys.is_cuda and find_spec("triton") is not None:
        _triton_kernel()(keys, noise, UNIT)
        return noise
    counters = torch.arange(1, vocabulary + 1, device=keys.device).mul_(_signed(GOLDEN))
    size = max(1, AT_ONCE // vocabulary) if keys.device.type == "cpu" else len(keys)
    for i in range(0, len(keys), size):
        bits = mix_(keys[i : i + size, None] + counters)
        bits.bitwise_right_shift_(1).bitwise_and_(2**RANDOM_BITS - 1).bitwise_or_(1)
        noise[i : i + size] = bits
    return noise.mul_(UNIT).neg_().log1p_().neg_()


def mix_(numbers: Tensor) -> Tensor:
    """Replace int64 numbers by random-looking ones, in place: equal ones by equal ones, others by others.

    Numbers that differ by 1 differ in about half of their bits afterwards, as unrelated ones do.
    """
    spare = torch.empty_like(numbers)
    for shift, factor in ROUNDS:
        torch.bitwise_right_shift(numbers, shift, out=spare)
        numbers.bitwise_xor_(spare.bitwise_and_(2 ** (64 - shift) - 1))  # int64 shifts its sign in
        if factor != 1:
            numbers.mul_(_signed(factor))
    return numbers


def _signed(number: int) -> int:
    """Return the int64 with the lowest 64 bits of a number.

    >>> _signed(2**64 - 1), _signed(2**64 + 5)
    (-1, 5)
    """
    return (number + 2**63) % 2**64 - 2**63


@lru_cache(maxsize=1)
def _triton_kernel() -> Any:
    from contrastive_align.sampling.triton_noise import fill

    return fill
