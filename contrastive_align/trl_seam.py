"""Every private or inner member of TRL, and of transformers' Trainer, that this package needs, each with its reason.

No other file of the package names one: a test reads them all. When TRL moves, this file is what has to follow, and the
tests beside it say where.
"""

from __future__ import annotations

# Inner modules of TRL: what they offer has no public import.
from trl.data_utils import extract_prompt
from trl.generation import vllm_generation
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.scripts.utils import DatasetConfig
from trl.trainer.utils import (
    RepeatSampler,
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    global_then_local_main_first,
    pad,
    remove_none_values,
    use_adapter,
)


__all__ = [
    "DatasetConfig",
    "RepeatSampler",
    "add_fused_lm_head",
    "create_model_from_path",
    "disable_dropout_in_model",
    "disable_gradient_checkpointing",
    "extract_prompt",
    "get_config_model_id",
    "global_then_local_main_first",
    "pad",
    "prepare_deepspeed",
    "remove_none_values",
    "unwrap_model_for_generation",
    "use_adapter",
    "vllm_generation",
]
