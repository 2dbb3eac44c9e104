"""What torch_compile=True means: a model's layers are compiled, one by one; what differs between batches is not."""

from __future__ import annotations

from accelerate.utils import DynamoBackend
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(trainer: Trainer, models: list[PreTrainedModel]) -> None:
    """Compile the layers of the models where the trainer's arguments, or ``accelerate launch``, ask for it.

    Accelerate would compile the model as a whole. The loss in its head and the attention over packed rows are made
    anew for every batch's lengths; the layers around them are the same, and one compilation serves them all.

    Raises:
        ValueError: under DeepSpeed or FSDP, or no layer that can be compiled.
    """
    plugin = trainer.accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("torch_compile is not supported under DeepSpeed or FSDP. Leave it out, or train with DDP.")
    options = {**plugin.to_kwargs(), "dynamic": True}
    plugin.backend = DynamoBackend.NO  # for the whole model, which the accelerator has not met yet
    for model in models:
        layers = layers_of(model)
        if not layers:
            raise ValueError(
                f"torch_compile: {type(model).__name__} has no layers of transformers' GradientCheckpointingLayer, "
                "which are what is compiled. Leave it out."
            )
        for layer in layers:
            layer.compile(**options)  # in place: its class and the names of its weights stay


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, embeddings, norms and heads left out."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
