"""Align a model on preference pairs: chosen and rejected, with or without a prompt column.

accelerate launch run_preference.py --loss_type=NCA                          # the bundled model and data
accelerate launch run_preference.py yamls/preference_qlora.yaml --loss_type=DPO
"""

import sys

from contrastive_align.launch.cli import command_line


if __name__ == "__main__":
    command_line(["preference", *sys.argv[1:]])
