"""Shared-prompt or padded: chosen once for a model, by trying both on a small batch."""

from __future__ import annotations

import copy

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from contrastive_align.models import attention
from contrastive_align.models.head import add_head
from contrastive_align.models.last_layer import run_prompts_whole, stop_prompts_at_keys
from contrastive_align.models.logps import completion_logps


logger = logging.get_logger(__name__)

LAYOUTS = ("auto", "shared", "padded")
# What rounding may make of the difference, in nats per token.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
TOLERANCE_16_BIT = 5e-2
ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, IndexError)  # by which models show that they cannot
LEAK = 1e-5  # what a completion's words may move the others by; 0 but where rows share a kernel's rounding (experts)


def set_layout(
    models: list[PreTrainedModel], wanted: str, *, obstacle: str | None = None, sharded: bool = False, autocast: bool
) -> str:
    """The layout under which all the models run: ``"shared"`` only where each of them can. Gives them their heads."""
    for model in models:
        add_head(model)
    options = {"obstacle": obstacle, "sharded": sharded, "autocast": autocast}
    layouts = {choose_layout(model, wanted, **options) for model in models}
    return "shared" if layouts == {"shared"} else "padded"


def choose_layout(
    model: PreTrainedModel | nn.Module,
    wanted: str,
    *,
    obstacle: str | None = None,
    sharded: bool = False,
    autocast: bool = False,
) -> str:
    """``"shared"`` where the model gives the same log-probs under it as its own forward does on padded rows.

    Under ``"shared"`` and ``"auto"`` the model's attention is set to :mod:`contrastive_align.models.attention`, and set
    back where that does not work. Models without such attention (linear attention, state space), those that drop the
    keywords it needs, and ALiBi, which would be wrong without an error, are found by the comparison; what rounding
    hides from it, by changing one completion, which must not move the others; windows, which are longer than what is
    tried, by asking which of them reach the attention.

    Args:
        wanted: one of ``LAYOUTS``.
        obstacle: why the shared layout cannot be tried, if it cannot.
        sharded: whether the weights may not be here as a whole (FSDP, ZeRO-3): a small model of the same class is tried
            in its place.
        autocast: whether the model computes in 16 bits whatever its weights are in.

    Raises:
        ValueError: ``wanted`` is ``"shared"`` and the model cannot.
    """
    if wanted == "padded":
        return "padded"
    base = model.get_base_model() if is_peft_model(model) else model
    own_attention = base.config._attn_implementation
    if sharded:
        run_prompts_whole(base)  # whatever was chosen for it before
    problem = obstacle or (_problem_with_a_small(base) if sharded else _problem_with(base, own_attention, autocast))
    if problem is None and sharded:
        base.set_attn_implementation(attention.NAME)
        if base.config._attn_implementation != attention.NAME:
            problem = "its attention cannot be replaced"
    if problem is None:
        return "shared"
    told = f"{type(base).__name__} has no shared-prompt layout: {problem}."
    if wanted == "shared":
        raise ValueError(f"{told} Set layout='padded' (or 'auto', which does so by itself).")
    logger.warning(f"{told} Each completion is computed with a prompt of its own.")
    return "padded"


def _problem_with(model: PreTrainedModel, own_attention: str, autocast: bool) -> str | None:
    """With a last layer that stops at the prompts' keys; where that has a problem, any, as the model is."""
    if stop_prompts_at_keys(model):
        if _problem_as_it_is(model, own_attention, autocast, errors=Exception) is None:
            return None
        run_prompts_whole(model)
    return _problem_as_it_is(model, own_attention, autocast)


def _problem_as_it_is(
    model: PreTrainedModel, own_attention: str, autocast: bool, errors: type | tuple[type, ...] = ERRORS
) -> str | None:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    was_training = model.training
    try:
        with torch.no_grad():
            problem = _difference(model, autocast)
    except errors as error:
        problem = f"{type(error).__name__} ({str(error).splitlines()[0] if str(error) else ''})"
    finally:
        model.train(was_training)
    if problem is not None and model.config._attn_implementation != own_attention:
        model.set_attn_implementation(own_attention)
    return problem


def _difference(model: PreTrainedModel, autocast: bool) -> str | None:
    batch, changed = _small_batches(model)
    # The mode it will train in, since in evaluation mode some 4-bit layers on CPU repack their weights for another
    # kernel; but not where dropout would blur the comparison.
    model.train()
    expected = _own_logps(model, batch)
    if not torch.equal(expected, _own_logps(model, batch)):
        model.eval()
        expected = _own_logps(model, batch)
    moved = _moved(expected, _own_logps(model, changed))
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        return "its attention cannot be replaced"
    # Windows are longer than this batch, whose log-probs say nothing of them.
    with attention.recorded_windows() as (of_masks, of_calls):
        model(input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1], use_cache=False)
    if lost := of_masks - of_calls:
        return f"a window of {' and '.join(map(str, lost))} tokens reaches its masks, but not its attention"
    found = completion_logps(model, batch, layout="shared")
    gap = ((found.logps - expected).abs() / found.lengths.clamp(min=1)).max().item()
    sixteen_bit = autocast or getattr(model, "is_quantized", False)
    tolerance = TOLERANCE_16_BIT if sixteen_bit else TOLERANCE.get(model.dtype, TOLERANCE_16_BIT)
    if not gap <= tolerance:  # not a number either
        return f"its log-probs differ by {gap:.2g} nats per token"
    # What 16 bits may hide from the comparison: layers that see the row as one text, as short convolutions do.
    leak = _moved(found.logps, completion_logps(model, changed, layout="shared").logps)
    if not leak <= max(LEAK, 10 * moved):
        return f"a completion's log-prob moves by {leak:.2g} nats with the words of another"
    return None


def _moved(before: Tensor, after: Tensor) -> float:
    """By how much the completions moved that are the same in both of ``_small_batches``: all but the second."""
    difference = (after - before).abs()
    difference[0, 1] = 0
    return difference.max().item()


def _problem_with_a_small(model: PreTrainedModel) -> str | None:
    """The problem of a model of the same class and config, but few layers, few words and random weights, on the CPU."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            small = _small(model)
        except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
            return f"no small model of its class to try it on, {type(error).__name__} ({error})"
        add_head(small)
        return _problem_as_it_is(small, small.config._attn_implementation, autocast=False)


def _small(model: PreTrainedModel) -> PreTrainedModel:
    """Its class and config, but few layers (one of each kind), few words, and random weights."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    layers = max(kinds.index(kind) for kind in set(kinds)) + 1 if kinds else 2
    text.num_hidden_layers = min(text.num_hidden_layers, layers)
    if kinds:
        text.layer_types = kinds[:layers]
    text.vocab_size = min(text.vocab_size, 128)
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    for width in ("intermediate_size", "moe_intermediate_size"):  # nothing of the layout depends on it
        if getattr(text, width, None):
            setattr(text, width, min(getattr(text, width), 256))
    config._attn_implementation = "eager"
    small = type(model)(config).float()
    with torch.no_grad():
        for p in small.parameters():
            if p.dim() > 1:  # as of a trained model: at the start of training all log-probs are alike
                p.normal_(std=p.size(-1) ** -0.5)
    return small


def _small_batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Two groups of random tokens, ragged, of different lengths; and the same with another second completion."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.size(0)
    prompts, completions = (5, 11), ((3, 7, 1), (4, 6))
    length = max(p + max(c) for p, c in zip(prompts, completions, strict=True))
    rows, masks, completion_masks = [], [], []
    for p, lengths in zip(prompts, completions, strict=True):
        prompt = torch.randint(vocabulary, (p,), generator=generator)
        for n in lengths:
            ids = torch.cat([prompt, torch.randint(vocabulary, (n,), generator=generator)])
            rows.append(torch.cat([ids, ids.new_zeros(length - p - n)]))
            masks.append([1] * (p + n) + [0] * (length - p - n))
            completion_masks.append([0] * p + [1] * n + [0] * (length - p - n))
    completion_masks = torch.tensor(completion_masks)
    batch = {
        "input_ids": torch.stack(rows),
        "attention_mask": torch.tensor(masks),
        "completion_mask": completion_masks,
        "valid": torch.tensor([[True, True, True], [True, True, False]]),
    }
    changed = batch["input_ids"].clone()
    words = completion_masks[1].bool()
    changed[1, words] = (changed[1, words] + 1 + vocabulary // 2) % vocabulary
    batches = [batch, {**batch, "input_ids": changed}]
    return [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]


def _own_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """By the model's own forward, attention and logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    sums = (log_probs * batch["completion_mask"][:, 1:]).sum(1)
    return sums.new_zeros(batch["valid"].shape).masked_scatter(batch["valid"], sums)
