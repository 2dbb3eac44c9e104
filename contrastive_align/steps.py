"""Conditional training in steps over JSONL files, as in the jobs of a cluster.

python -m contrastive_align.steps sample --model_name_or_path=... --prompts=prompts.jsonl --output=gen.jsonl
python -m contrastive_align.steps score --input=gen.jsonl --output=scored.jsonl --reward=rewards.py:polite
python -m contrastive_align.steps train --input=scored.jsonl --output_dir=runs/round1 --condition=phrases ...
"""

from contrastive_align.launch.step_commands import main


if __name__ == "__main__":
    main()
