"""``python -m contrastive_align.demo``: ``contrastive-align reward``. Takes the same flags.

``--preference`` first makes it ``contrastive-align preference``.
"""

import sys
from importlib import import_module


if __name__ == "__main__":
    flags = sys.argv[1:]
    preference = flags[:1] == ["--preference"]
    # By name: the commands import the demo, which therefore imports no command.
    main = import_module("contrastive_align.launch.cli").main
    main(["preference", *flags[1:]] if preference else ["reward", *flags])
