"""TRL's head of a GPU gives on a packed row what this package's head of a CPU gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_triton_kernels_of_trl_score_a_packed_row():
    worker = Path(__file__).with_name("triton_worker.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # to be set before Triton is imported
    done = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert set(gaps) == {"Llama", "Gemma2"}
    for found in gaps.values():
        assert len(found) == 5
        assert found["logps"] < 2e-5 and found["gradient"] < 1e-5
        assert max(found[name] for name in ("entropy", "mean_logits", "is_top1")) < 1e-5
