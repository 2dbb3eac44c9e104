"""The noise of a draw: exponential, fine near zero, without pattern, the same on every device."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive_align.sampling.noise import GOLDEN, ROUNDS, exponential_noise


def by_hand(seed: int, step: int, token: int) -> float:
    """The docstring's formula with Python's integers."""

    def mixed(z: int) -> int:
        for shift, factor in ROUNDS:
            z = (z ^ (z >> shift)) * factor % 2**64
        return z

    bits = mixed(mixed((seed + GOLDEN * (step + 1)) % 2**64) + GOLDEN * (token + 1) & 2**64 - 1)
    return -math.log1p(-((bits >> 1) | 1) * 2.0**-63)


def test_it_is_the_formula():
    seeds = [0, 1, 2**63 - 1, 123456789]
    found = exponential_noise(torch.tensor(seeds), 7, 90_000)
    for row, seed in enumerate(seeds):
        for token in (0, 1, 255, 65_536, 89_999):
            assert found[row, token].item() == pytest.approx(by_hand(seed, 7, token), rel=1e-6)


def seed_of(bits: int, step: int, token: int) -> int:
    """The seed of which a token's 64 random bits are these."""

    def unmixed(z: int) -> int:
        for shift, factor in reversed(ROUNDS):
            z = mixed = z * pow(factor, -1, 2**64) % 2**64
            for _ in range(64 // shift):
                z = mixed ^ (z >> shift)
        return z

    seed = unmixed((unmixed(bits) - GOLDEN * (token + 1)) % 2**64) - GOLDEN * (step + 1)
    return (seed + 2**63) % 2**64 - 2**63


def test_it_is_finite_where_float32_rounds_to_1():
    """An infinite clock would let a token win that cannot be drawn, where only one token can."""
    for bits in (2**64 - 1, 2**64 - 2**39):
        found = exponential_noise(torch.tensor([seed_of(bits, 3, 17)]), 3, 20)[0, 17].item()
        assert found == pytest.approx(24 * math.log(2), rel=1e-6)
    assert exponential_noise(torch.tensor([seed_of(0, 3, 17)]), 3, 20)[0, 17].item() == pytest.approx(2.0**-63)


def test_it_is_exponential_and_fine_near_zero():
    n = 2**22
    noise = exponential_noise(torch.tensor([0, 1]), 0, n // 2).flatten()
    assert noise.dtype == torch.float32
    for power in range(1, 4):  # E[x^k] = k!
        moments = noise.double() ** power
        assert abs(moments.mean() - math.factorial(power)) < 4 * moments.std() / n**0.5
    small = noise[noise < 1e-4]
    assert abs(len(small) - n * 1e-4) < 4 * (n * 1e-4) ** 0.5
    assert len(small.unique()) == len(small)  # in steps of 2^-24 about one in eight would be there twice
    assert noise.min() > 0


def test_rows_steps_and_tokens_are_independent():
    rows, steps, tokens = 256, 32, 256  # neighbouring seeds
    uniform = torch.stack([-torch.expm1(-exponential_noise(torch.arange(rows), s, tokens)) for s in range(steps)], 1)
    bins, n = (uniform.double() * 16).long().clamp(max=15), uniform.numel()
    for axis in range(3):
        for lag in (1, 2, 16):
            a, b = (bins.narrow(axis, start, bins.size(axis) - lag) for start in (0, lag))
            counts = torch.bincount((16 * a + b).flatten(), minlength=256).double()
            expected = a.numel() / 256
            chi_squared = ((counts - expected) ** 2 / expected).sum().item()
            assert abs(chi_squared - 255) < 4 * (2 * 255) ** 0.5, (axis, lag)
    assert abs(uniform.double().mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5


def test_a_row_keeps_its_noise_wherever_it_is():
    seeds = torch.tensor([5, 9, 2, 7])
    whole = exponential_noise(seeds, 3, 40_000)
    assert torch.equal(whole[[2, 0]], exponential_noise(seeds[[2, 0]], 3, 40_000))
    assert torch.equal(whole[:, :24], exponential_noise(seeds, 3, 24))
    assert not (whole == exponential_noise(seeds, 4, 40_000)).any()


TRITON = """
import contextlib, sys
import torch
from contrastive_align.sampling.noise import GOLDEN, UNIT, _signed, exponential_noise, mix_
from contrastive_align.sampling.triton_noise import fill
seeds = torch.tensor([0, 1, int(sys.argv[1])])
entered = []
torch.cuda.device_of = lambda tensor: (entered.append(tensor.data_ptr()), contextlib.nullcontext())[1]
found = torch.full((4, 3000), -1.0)
fill(mix_(seeds + _signed(GOLDEN * 6)), found[:3], UNIT)
wanted = exponential_noise(seeds, 5, 3000)
assert entered == [found.data_ptr()]  # on the device of the tensors, which may not be the current one
assert (found[3] == -1).all() and (found[:3] > 0).all()
print((found[:3] / wanted - 1).abs().max().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernel_of_a_gpu_gives_the_same():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}  # set before Triton is imported
    told = [sys.executable, "-c", TRITON, str(seed_of(2**64 - 1, 5, 17))]
    done = subprocess.run(told, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert float(done.stdout) < 4e-6
