"""How the workers of the tests with two processes run and end."""

import gc
from collections.abc import Callable

from accelerate import PartialState

from contrastive_align.trainers.processes import end_one_of_several, keep_to_the_end


def run_worker(main: Callable[..., None], *args: str) -> None:
    """Run ``main``, and end this process once all have arrived: else one ends while another still talks to it."""
    gc.freeze()  # imported modules are not searched for garbage at the end of every train()
    main(*args)
    keep_to_the_end(None)
    PartialState().wait_for_everyone()
    end_one_of_several()
