"""``python -m contrastive_align.demo``: what ``run_reward.py`` does, without a checkout. Takes the same flags.

``--preference`` first makes it ``run_preference.py``.
"""

import sys

from contrastive_align.launch.contrastive import main


if __name__ == "__main__":
    flags = sys.argv[1:]
    preference = flags[:1] == ["--preference"]
    main(flags[1:] if preference else flags, preference=preference)
