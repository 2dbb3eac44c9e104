"""The noise of :mod:`contrastive_align.sampling.noise` as one Triton kernel, for CUDA devices."""

import torch
import triton
import triton.language as tl
from torch import Tensor


BLOCK = 1024


@triton.jit
def _fill(keys, noise, vocabulary, unit: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    golden = tl.full((1,), 0x9E3779B97F4A7C15, tl.uint64)
    z = tl.load(keys + row).to(tl.uint64) + (token + 1).to(tl.uint64) * golden
    z = (z ^ (z >> 30)) * tl.full((1,), 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((1,), 0x94D049BB133111EB, tl.uint64)
    z = ((z ^ (z >> 31)) >> 1) | 1
    u = z.to(tl.int64).to(tl.float32) * unit
    series = u * (1 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))  # of -log(1 - u), whose difference would round
    found = tl.where(u < 0.015625, series, -tl.log(1 - u))
    tl.store(noise + row * vocabulary + token, found, mask=token < vocabulary)


def fill(keys: Tensor, noise: Tensor, unit: float) -> None:
    """Fill noise (n, V) float32 from the keys (n,) int64 of its rows. The random bits times ``unit`` are in (0, 1)."""
    rows, vocabulary = noise.shape
    with torch.cuda.device_of(noise):  # Triton launches on the current device, wherever its tensors are
        _fill[(rows, triton.cdiv(vocabulary, BLOCK))](keys, noise, vocabulary, unit, BLOCK)
