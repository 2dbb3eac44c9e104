"""``python -m contrastive_align``: the same as ``contrastive-align``."""

from contrastive_align.launch.cli import command_line


if __name__ == "__main__":
    command_line()
