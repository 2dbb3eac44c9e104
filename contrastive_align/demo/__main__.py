"""``python -m contrastive_align.demo``: what ``run_reward.py`` does, without a checkout. Takes the same flags.

``--preference`` first makes it ``run_preference.py``.
"""

import runpy
import sys


if __name__ == "__main__":
    flags = sys.argv[1:]
    preference = flags[:1] == ["--preference"]
    # Run by name: the commands import the demo, which therefore imports no command.
    main = runpy.run_module("contrastive_align.launch.contrastive")["main"]
    main(flags[1:] if preference else flags, preference=preference)
