"""How the workers of the tests with two processes end."""

from accelerate import PartialState

from contrastive_align.trainers.processes import end_one_of_several, keep_to_the_end


def end_processes() -> None:
    """End this process once all have arrived: else one ends while another still talks to it."""
    keep_to_the_end(None)
    PartialState().wait_for_everyone()
    end_one_of_several()
