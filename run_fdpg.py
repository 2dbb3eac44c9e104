"""Say what the model should be, and get there: prompts and a target instead of completions and scores.

accelerate launch run_fdpg.py                                                # the bundled model, "please" in half
accelerate launch run_fdpg.py yamls/fdpg.yaml --divergence=kl                # a YAML, flags go first
accelerate launch run_fdpg.py --model_name_or_path=... --prompt="Once" --features='[{contains: king, moment: 0.5}]'
accelerate launch run_fdpg.py --model_name_or_path=... --dataset_name=prompts.txt --reward_funcs=rewards.py:polite
"""

import sys

from contrastive_align.launch.cli import command_line


if __name__ == "__main__":
    command_line(["fdpg", *sys.argv[1:]])
