"""The Slurm script, with stand-ins for the commands of Slurm and of this package."""

import os
import subprocess
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm" / "run.sbatch"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> requeued; fi',
    "srun": 'shift; for SLURM_NODEID in 0 1; do SLURM_NODEID=$SLURM_NODEID "$@" || exit $?; done',
    "contrastive-align": 'printf "%s\\n" "$*" >> calls; exit ${STATUS:-0}',
}


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (143, True)])
def test_every_machine_is_started_and_a_stopped_job_requeued(tmp_path, status, requeued):
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status)}
    flags = ["reward", "--prompt=two words", "--output_dir=runs/a"]
    done = subprocess.run([SCRIPT, *flags], cwd=tmp_path, env={**environment, "CONFIG": "zero3"})
    assert done.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == (1 if status else 2)
    for rank, call in enumerate(calls):
        assert call.startswith("reward --prompt=two words --output_dir=runs/a --accelerate_config=zero3")
        for flag in ("num_machines=2", "num_processes=8", f"machine_rank={rank}", "main_process_ip=node7"):
            assert f"--{flag} " in call
        assert call.endswith("--resume_from_checkpoint=true")
    assert (tmp_path / "requeued").exists() == requeued
