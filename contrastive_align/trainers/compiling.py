"""What torch_compile=True means: the parts of a model's layers are compiled; what differs between batches is not."""

from __future__ import annotations

from accelerate.utils import DynamoBackend
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(trainer: Trainer, models: list[PreTrainedModel]) -> None:
    """Compile the layers of the models where the trainer's arguments, or ``accelerate launch``, ask for it.

    Accelerate would compile the model as a whole. The loss in its head and the attention over packed rows are made
    anew for every batch's lengths; the layers around them are the same, and one compilation serves them all. A layer
    as a whole is not compiled where it is checkpointed; its parts (attention, MLP, norms) are.

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
        parts = parts_of(model)
        if not parts:
            raise ValueError(
                f"torch_compile: {type(model).__name__} has no layers of transformers' GradientCheckpointingLayer, "
                "whose parts are what is compiled. Leave it out."
            )
        for part in parts:
            part.compile(**options)  # in place: its class and the names of its weights stay


def parts_of(model: nn.Module) -> list[nn.Module]:
    """What the blocks of a transformer call: attention, MLP and norms, embeddings and heads left out."""
    return [
        part for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) for part in _called(layer)
    ]


def _called(module: nn.Module) -> list[nn.Module]:
    """Its children, those of a list (as T5's) one by one: a list is not called itself."""
    parts = []
    for child in module.children():
        parts += _called(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return parts
