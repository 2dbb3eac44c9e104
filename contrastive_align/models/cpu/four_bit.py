"""4-bit layers on a CPU: one function in training and in evaluation."""

from __future__ import annotations

from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)


def use_training_kernel(model: nn.Module) -> None:
    """Make bitsandbytes' 4-bit layers compute in evaluation as they do in training, in their compute dtype.

    On a CPU with AVX512-BF16 they would repack their weights at the first forward pass in evaluation mode, for a kernel
    that rounds activations and scales to bfloat16, whatever the compute dtype. The weights stay packed in training
    afterwards, where that kernel has no gradient for its input. Weights that are packed already are unpacked.
    """
    unpacked = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # unpacks the weight in place
                unpacked += 1
    if unpacked:
        logger.warning(
            f"The scales of {unpacked} 4-bit layers were rounded to bfloat16 when the model was evaluated on this CPU "
            "before training. Load the model anew to train on the weights as they are on the disk."
        )
