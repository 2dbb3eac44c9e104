"""What only a CPU runs. The docstring of each file states the figure it buys."""
