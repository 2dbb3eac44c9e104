"""How often the host waits for the device: on a GPU each such operation is a synchronisation."""

from __future__ import annotations

import collections
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "aten.equal")
PACKAGES = ("contrastive_align/", "trl/", "accelerate/", "transformers/")
ON_A_CPU_ALONE = "models/cpu/"


class Waits(TorchDispatchMode):
    """Counts operations of which the host must read a value, or the shape of the result, by the line they come from."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __enter__(self):
        self._tolist = tolist = torch.Tensor.tolist
        torch.Tensor.tolist = lambda tensor: (self.count(), tolist(tensor))[1]
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith(("aten.index.Tensor", "aten.index_put")):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        elif name.startswith("aten.repeat_interleave.Tensor"):
            waits = (kwargs or {}).get("output_size") is None
        else:
            waits = any(wait in name for wait in WAITS)
        if waits:
            self.count()
        return function(*args, **(kwargs or {}))

    def count(self):
        """Count one wait, at the innermost line of the libraries at work."""
        stack = [f for f in traceback.extract_stack() if any(package in f.filename for package in PACKAGES)]
        if stack and not any(ON_A_CPU_ALONE in f.filename for f in stack):
            self.found[f"{stack[-1].filename}:{stack[-1].lineno}"] += 1
