"""How many logits are in memory at once where they are computed in chunks."""

from __future__ import annotations

import torch

from contrastive_align.models.cpu.head import BLOCK_LOGITS, CHUNK_LOGITS


ACCELERATOR_CHUNK = 2**27  # as the tiles of TRL's kernels: long enough to be bound by arithmetic, 256 MB in 16 bits
ACCELERATOR_BLOCK = 2**25  # an elementwise pass over it takes ten times as long as its launch


def rows_at_once(device: torch.device, vocabulary: int) -> tuple[int, int]:
    """Return the tokens of a chunk, whose logits are one product, and those of a block, which a loss takes at once.

    TRL's chunked kernels compute log-probs, entropies and divergences; a loss that combines them reads blocks of these.

    >>> rows_at_once(torch.device("cuda"), 128_000), rows_at_once(torch.device("cpu"), 128_000)
    ((1048, 262), (65, 4))
    """
    sizes = (CHUNK_LOGITS, BLOCK_LOGITS) if device.type == "cpu" else (ACCELERATOR_CHUNK, ACCELERATOR_BLOCK)
    chunk, block = (max(1, size // vocabulary) for size in sizes)
    return chunk, block
