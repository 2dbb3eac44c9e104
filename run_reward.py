"""Align a model on explicit rewards: K completions per prompt, a number each.

accelerate launch run_reward.py --loss_type=NCA                              # the bundled model and data
accelerate launch run_reward.py yamls/reward_qlora.yaml --beta=0.01          # a YAML, flags go first
accelerate launch run_reward.py --model_name_or_path=... --dataset_name=my_groups.jsonl --loss_type=InfoNCA
"""

import sys

from contrastive_align.launch.cli import command_line


if __name__ == "__main__":
    command_line(["reward", *sys.argv[1:]])
