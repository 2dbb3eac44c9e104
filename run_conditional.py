"""Train on a model's own completions, conditioned on how good they are; then ask for the best.

accelerate launch run_conditional.py                                              # the bundled model, quantile tokens
accelerate launch run_conditional.py yamls/alt_rm.yaml --kl_direction=forward     # a YAML, flags go first
accelerate launch run_conditional.py --model_name_or_path=... --dataset_name=prompts.txt --reward=rewards.py:polite
accelerate launch run_conditional.py --model_name_or_path=... --dataset_name=scored.jsonl --score_column=toxicity \
    --negate_score                                                                # completions that are there already
python run_conditional.py --model_name_or_path=output_dir --best="a prompt"       # what the trained model says
"""

import sys

from contrastive_align.launch.cli import command_line


if __name__ == "__main__":
    command_line(["conditional", *sys.argv[1:]])
