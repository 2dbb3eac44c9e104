"""How the workers of the tests with two processes end."""

import gc

import torch


def end_processes() -> None:
    """Join the threads of the process group, once no local variable holds a trainer any more.

    A gloo thread that drops the tensors of the last collective while Python shuts down aborts the process.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # else one process ends while another still talks to it
        torch.distributed.destroy_process_group()
    gc.collect()
