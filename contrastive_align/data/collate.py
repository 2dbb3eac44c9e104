"""Token ids -> GroupBatch: the one shape every trainer and loss sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from contrastive_align.trl_seam import pad


@dataclass
class GroupCollator(DataCollatorMixin):
    """Batch groups of any K. N is the number of completions in the batch, row after row.

    Expects ``prompt_ids``, ``completion_ids`` and ``scores`` in every example, optionally ``ref_logps`` (K reference
    log-probs). Returns

    - ``input_ids``, ``attention_mask``, ``completion_mask`` (N, L): prompt + completion, padded on the right
    - ``scores`` (B, K) in ``score_dtype``, and ``valid`` (B, K) bool: False where a group has fewer completions
    - ``ref_logps`` (B, K) and ``row`` (B,), the rows' numbers, if given

    The N rows are the True entries of ``valid`` in row-major order.

    >>> collator = GroupCollator(pad_token_id=0)
    >>> batch = collator([
    ...     {"prompt_ids": [1, 2], "completion_ids": [[4], [5, 6], [7]], "scores": [1.0, 0.0, 0.5]},
    ...     {"prompt_ids": [3], "completion_ids": [[8], [9]], "scores": [0.0, 2.0]},
    ... ])
    >>> batch["input_ids"]
    tensor([[1, 2, 4, 0],
            [1, 2, 5, 6],
            [1, 2, 7, 0],
            [3, 8, 0, 0],
            [3, 9, 0, 0]])
    >>> batch["completion_mask"]
    tensor([[0, 0, 1, 0],
            [0, 0, 1, 1],
            [0, 0, 1, 0],
            [0, 1, 0, 0],
            [0, 1, 0, 0]])
    >>> batch["scores"], batch["valid"]
    (tensor([[1.0000, 0.0000, 0.5000],
            [0.0000, 2.0000, 0.0000]], dtype=torch.float64), tensor([[ True,  True,  True],
            [ True,  True, False]]))
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    score_dtype: torch.dtype = torch.float64
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [(e["prompt_ids"], ids) for e in examples for ids in e["completion_ids"]]
        batch = {
            "input_ids": self._pad([prompt + ids for prompt, ids in rows], self.pad_token_id),
            "attention_mask": self._pad([[1] * (len(prompt) + len(ids)) for prompt, ids in rows], 0),
            "completion_mask": self._pad([[0] * len(prompt) + [1] * len(ids) for prompt, ids in rows], 0),
            "scores": to_table([e["scores"] for e in examples], self.score_dtype),
            "valid": to_table([[True] * len(e["scores"]) for e in examples], torch.bool),
        }
        if "row" in examples[0]:
            batch["row"] = torch.tensor([e["row"] for e in examples])
        if "ref_logps" in examples[0]:
            batch["ref_logps"] = to_table([e["ref_logps"] for e in examples], torch.float32)
        return batch

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad(tensors, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


def to_table(rows: list[list[float]], dtype: torch.dtype) -> torch.Tensor:
    """Ragged rows as (B, K), short rows filled with 0.

    >>> to_table([[1.0, 2.0], [3.0]], torch.float32)
    tensor([[1., 2.],
            [3., 0.]])
    """
    k = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (k - len(row))] for row in rows], dtype=dtype)
