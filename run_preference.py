"""Align a model on preference pairs: chosen and rejected, with or without a prompt column.

accelerate launch run_preference.py --loss_type=NCA                          # the bundled model and data
accelerate launch run_preference.py yamls/preference_qlora.yaml --loss_type=DPO
"""

import sys

from contrastive_align.launch.cli import main


if __name__ == "__main__":
    main(["preference", *sys.argv[1:]])
