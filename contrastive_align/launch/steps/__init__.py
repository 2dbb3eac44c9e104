"""The parts of a round of conditional training, each a command over JSONL files: one prompt a line."""
