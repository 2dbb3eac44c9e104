"""Choose shared-prompt or padded rows for a model, by comparing both on a small batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import logging

from contrastive_align.data.collate import GroupCollator
from contrastive_align.models.head import add_head
from contrastive_align.models.last_layer import LastLayer
from contrastive_align.models.layer_by_layer import RecordedLayers
from contrastive_align.models.logps import completion_logps, per_completion
from contrastive_align.models.noise import MOST_ROWS, Batch, gap_per_token, measure_noise, other_batches, places
from contrastive_align.models.packed_row import PackedRow
from contrastive_align.models.shared_prompt import ATTENTION_NAME, AttentionOptions, record_options


logger = logging.get_logger(__name__)

LAYOUTS = ("auto", "shared", "padded")
# Root mean square of the difference of a token's log-prob that counts as rounding, in nats: where it is larger than
# what these models' own passes show, and in 16 bits the dtype's epsilon.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
NOISE = 3  # times the model's own rounding; right layouts of 11 bfloat16 models of 4 to 48 layers had 0.5 to 1.2
LAYER_NOISE = 2  # times that of a layer by itself, which is much steadier; right ones had 0.9 to 1.3
LAYER_ROWS = 4  # that are computed one by one to measure it
MODEL_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, IndexError)  # raised by models without the layout
# Nats that a completion's log-prob may move by with the words of another. Experts share a kernel's rounding; else 0.
LEAK_TOLERANCE = 1e-5


def set_layout(models: list[PreTrainedModel], wanted: str, **options: Any) -> str:
    """Add the head to all models and return their common layout: ``"shared"`` only if each of them supports it.

    Options and errors are those of :func:`choose_layout`, for each of ``models`` (policy and reference).
    """
    for model in models:
        add_head(model)
    layouts = {choose_layout(model, wanted, **options) for model in models}
    return "shared" if layouts == {"shared"} else "padded"


def choose_layout(
    model: PreTrainedModel | nn.Module,
    wanted: str,
    *,
    obstacle: str | None = None,
    sharded: bool = False,
    autocast: torch.dtype | None = None,
) -> str:
    """Return ``"shared"`` if the model gives the same log-probs under it as its own forward gives on padded rows.

    Under ``"shared"`` and ``"auto"`` the model's attention is set to :mod:`contrastive_align.models.shared_prompt`, and
    set back if that does not work. Comparing log-probs finds models without such attention (linear attention, state
    space), models that drop its keywords, and ALiBi, which would be wrong without an error. In 16 bits a small float32
    model of the same class is compared as well, then each attention layer of this model by itself, and what may differ
    is measured: the model's own pass over a batch against those row by row, and under eager attention.

    Args:
        model: a causal language model with :func:`~contrastive_align.models.head.add_head`, or a PEFT model of one.
        wanted, obstacle: one of ``LAYOUTS``, and why the shared layout cannot be tried, or None.
        sharded: whether the weights may be incomplete here (FSDP, ZeRO-3); a small model of the same class is then
            tried instead.
        autocast: the dtype that the model computes in, where it is not that of its weights.

    Raises:
        ValueError: ``wanted`` is ``"shared"`` and the model does not support it.
    """
    if wanted == "padded":
        return "padded"
    base = model.get_base_model() if is_peft_model(model) else model
    problem = obstacle
    if problem is None and (sharded or _rounds_coarsely(base, autocast)):  # rounding may hide a problem of the class
        problem = _find_problem_in_small_model(base, needed=sharded)
    if problem is None and not sharded:
        problem = _find_problem(base, autocast)
    if problem is None and sharded:
        problem = _set_shared_attention(base)
    if problem is None:
        return "shared"
    message = f"{type(base).__name__} has no shared-prompt layout: {problem}."
    if wanted == "shared":
        raise ValueError(f"{message} Set layout='padded' (or 'auto', which does so by itself).")
    logger.warning(f"{message} Each completion is computed with a prompt of its own.")
    return "padded"


def _set_shared_attention(model: PreTrainedModel) -> str | None:
    """Set the model's attention to the shared-prompt one, and return why that failed, or None."""
    model.set_attn_implementation(ATTENTION_NAME)
    return None if model.config._attn_implementation == ATTENTION_NAME else "its attention cannot be replaced"


def _rounds_coarsely(model: PreTrainedModel, autocast: torch.dtype | None) -> bool:
    return _epsilon(model, autocast) >= torch.finfo(torch.float16).eps


def _epsilon(model: PreTrainedModel, autocast: torch.dtype | None) -> float:
    """Return the spacing of the numbers that the model computes with, above 1."""
    if getattr(model, "is_quantized", False):
        return torch.finfo(torch.bfloat16).eps
    return max(torch.finfo(dtype).eps for dtype in (model.dtype, autocast or model.dtype))


def _find_problem(model: PreTrainedModel, autocast: torch.dtype | None) -> str | None:
    """Return why the model cannot use the shared layout, or None. A problem leaves its own attention in place."""
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    own_attention, was_training = model.config._attn_implementation, model.training
    try:
        with (
            torch.no_grad(),
            torch.autocast(model.device.type, autocast, enabled=autocast is not None),
            torch.compiler.set_stance("force_eager"),  # compiled modules ignore hooks that are added later
        ):
            problem = _find_difference(model, autocast)
    except MODEL_ERRORS as error:
        problem = f"{type(error).__name__} ({str(error).splitlines()[0] if str(error) else ''})"
    finally:
        model.train(was_training)
    if problem is not None and model.config._attn_implementation != own_attention:
        model.set_attn_implementation(own_attention)
    return problem


def _find_difference(model: PreTrainedModel, autocast: torch.dtype | None) -> str | None:
    """Return how the shared layout differs from the model's own forward on a small batch, or None."""
    LastLayer.remove_from(model)  # of an earlier choice: all layers are tried on all tokens
    batch, changed = _small_batches(model)
    # In evaluation mode some 4-bit layers on CPU repack their weights for another kernel, so the comparison runs in
    # training mode, unless dropout would blur it.
    model.train()
    expected = _own_logps(model, batch)
    if not torch.equal(expected, _own_logps(model, batch)):
        model.eval()
        expected = _own_logps(model, batch)
    rounding = _largest_shift(expected, _own_logps(model, changed))
    with contextlib.closing(_own_ways(model, batch)) as ways:
        own_noise = measure_noise(
            expected[batch["valid"]],
            batch["completion_mask"].sum(1),
            lambda one: (_own_logps(model, one)[one["valid"]], one["completion_mask"].sum(1)),
            ways,
        )
    own_attention = model.config._attn_implementation
    if problem := _set_shared_attention(model):
        return problem
    # Windows are longer than this batch, so its log-probs cannot show them. Dropout is that of training.
    training = model.training
    model.train()
    with record_options() as options:
        model(input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1], use_cache=False)
    model.train(training)
    if problem := _find_lost_option(options):
        return problem
    found = completion_logps(model, batch, layout="shared")
    gap = _gap(found.logps, expected, batch)
    epsilon = _epsilon(model, autocast)
    tolerance = max(NOISE * own_noise, TOLERANCE.get(model.dtype, 0.0), epsilon)
    if not gap <= tolerance:  # also true for NaN
        return f"its log-probs differ by {gap:.2g} nats per token, its own from each other by {own_noise:.2g}"
    # In 16 bits the comparison may miss layers that mix neighbouring tokens of the row, such as short convolutions.
    leak = _largest_shift(found.logps, completion_logps(model, changed, layout="shared").logps)
    if not leak <= max(LEAK_TOLERANCE, 10 * rounding):
        return f"a completion's log-prob moves by {leak:.2g} nats with the words of another"
    if _rounds_coarsely(model, autocast):
        if problem := _find_wrong_layer(model, batch, options.layers, own_attention, epsilon):
            return problem
    if last_layer := LastLayer.add_to(model):
        try:
            found = completion_logps(model, batch, layout="shared")
            serves = last_layer.shared_prompt is None and _gap(found.logps, expected, batch) <= tolerance
        except MODEL_ERRORS:
            serves = False
        if not serves:
            LastLayer.remove_from(model)
    return None


def _find_lost_option(options: AttentionOptions) -> str | None:
    """Return which window of the model's masks, or which dropout, a packed row would lose, or None."""
    if lost := options.mask_windows - options.windows:
        return f"a window of {' and '.join(map(str, lost))} tokens reaches its masks, but not its attention"
    for of_mask, of_call in options.unlike:
        return f"an attention call has a mask with a window of {of_mask} tokens, but a sliding_window of {of_call}"
    if options.dropouts:
        return f"its attention has a dropout of {max(options.dropouts):g}, which packed rows do not have"
    return None


def _find_wrong_layer(
    model: PreTrainedModel, batch: Batch, layers: list[nn.Module], own_attention: str, epsilon: float
) -> str | None:
    """Return which call of attention differs from that of the model's own pass by more than its rounding, or None."""
    width, packed = batch["input_ids"].size(1), PackedRow.of_batch(batch).on(model.device).tokens

    def own_passes(batches: list[Batch]) -> Iterator[tuple[Callable[[], Tensor], Tensor]]:
        return zip((partial(_own_logps, model, one) for one in batches), places(batches, width), strict=True)

    model.set_attn_implementation(own_attention)
    recorded = RecordedLayers(layers, partial(_own_logps, model, batch), batch["attention_mask"])
    with contextlib.closing(_own_ways(model, batch, LAYER_ROWS)) as ways:
        noise = torch.stack([recorded.gaps(own_passes(batches)) for batches in ways])
    noise = noise.nan_to_num(0.0, 0.0).amax(0)  # a way that overflows says nothing
    model.set_attn_implementation(ATTENTION_NAME)
    gaps = recorded.gaps([(partial(completion_logps, model, batch, layout="shared"), packed)])
    wrong = ~(gaps <= (LAYER_NOISE * noise).clamp(min=epsilon))  # also true for NaN
    if not wrong.any():
        return None
    i = int(wrong.nonzero()[0])
    what = f"the output of its attention {i}" if i else "what its first attention receives"
    return f"{what} differs by {gaps[i]:.1%} of its norm, and between the model's own passes by {noise[i]:.1%}"


def _gap(found: Tensor, expected: Tensor, batch: dict[str, Tensor]) -> float:
    """Return the root mean square of the difference of a token's log-prob, between log-probs (B, K)."""
    valid = batch["valid"]
    return gap_per_token(found[valid], expected[valid], batch["completion_mask"].sum(1)).item()


def _own_ways(model: PreTrainedModel, batch: Batch, rows: int = MOST_ROWS) -> Iterator[list[Batch]]:
    """Yield batches that the model computes by itself in another way: row by row, and under eager attention.

    A model whose own attention is eager keeps its scores in float32 for that. Close the generator to set it back.
    """
    yield other_batches(batch, rows)[0]
    own_attention = model.config._attn_implementation
    scores = _PreciseScores() if own_attention == "eager" else contextlib.nullcontext()
    try:
        model.set_attn_implementation("eager")
        with scores:
            _own_logps(model, batch)
            yield [batch]
    except MODEL_ERRORS:
        pass
    finally:
        model.set_attn_implementation(own_attention)


class _PreciseScores(TorchFunctionMode):
    """Eager attention that keeps its scores in float32, as the kernels of a packed row do.

    In 16 bits the eager attention of transformers rounds them, and by itself in the same way in every batch.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and _multiplies_keys(*args):
            with torch.autocast(args[0].device.type, enabled=False):
                return function(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in args))
        return function(*args, **(kwargs or {}))


def _multiplies_keys(left: Any = None, right: Any = None) -> bool:
    """Return whether these are queries (B, H, n, D) and transposed keys (B, H, D, n)."""
    return all(isinstance(t, Tensor) and t.dim() == 4 for t in (left, right)) and right.stride(-2) == 1


def _largest_shift(before: Tensor, after: Tensor) -> float:
    """Return the largest difference of log-probs among the completions that both ``_small_batches`` share."""
    difference = (after - before).abs()
    difference[0, 1] = 0
    return difference.max().item()


def _find_problem_in_small_model(model: PreTrainedModel, *, needed: bool) -> str | None:
    """Return the problem of a small random model of the same class in float32 on the CPU, or None.

    Args:
        needed: whether it is a problem if there can be no such model.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            small = _small_model(model)
        except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
            return f"no small model of its class to try it on, {type(error).__name__} ({error})" if needed else None
        add_head(small)
        return _find_problem(small, autocast=None)


def _small_model(model: PreTrainedModel) -> PreTrainedModel:
    """Build a model of the same class and config, with few layers, few words and random weights."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    layers = max(kinds.index(kind) for kind in set(kinds)) + 1 if kinds else 2
    text.num_hidden_layers = min(text.num_hidden_layers, layers)
    if kinds:
        text.layer_types = kinds[:layers]
    text.vocab_size = min(text.vocab_size, 128)
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    for width in ("intermediate_size", "moe_intermediate_size"):  # the layout does not depend on it
        if getattr(text, width, None):
            setattr(text, width, min(getattr(text, width), 256))
    config._attn_implementation = "eager"
    small = type(model)(config).float()
    dropout = max((m.p for m in model.modules() if isinstance(m, nn.Dropout)), default=0.0)
    for module in small.modules():
        if isinstance(module, nn.Dropout):  # which may be off in the model, whatever its config says
            module.p = min(module.p, dropout)
    with torch.no_grad():
        for p in small.parameters():
            if p.dim() > 1:  # large weights: in a new model all log-probs are alike
                p.normal_(std=p.size(-1) ** -0.5)
    return small


def _small_batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Return ragged groups of random tokens, and the same groups with another second completion."""
    generator = torch.Generator().manual_seed(0)
    # The head may have fewer words than the embedding, which has a padding token of its own in some models.
    vocabulary = min(model.get_input_embeddings().weight.size(0), model.config.get_text_config().vocab_size)
    groups = []
    for lengths in ((5, 3, 7, 1, 9), (11, 4, 6), (3, 5, 10, 4, 7)):  # a prompt and its completions
        prompt, *completions = (torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths)
        groups.append({"prompt_ids": prompt, "completion_ids": completions, "scores": [0.0] * len(completions)})
    batch = GroupCollator(0, score_dtype=torch.float32)(groups)  # mps has no float64
    changed = batch["input_ids"].clone()
    words = batch["completion_mask"][1].bool()
    changed[1, words] = (changed[1, words] + 1 + vocabulary // 2) % vocabulary
    batches = [batch, {**batch, "input_ids": changed}]
    return [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]


def _own_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Compute log-probs (B, K) by the model's own forward, attention and logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return per_completion((log_probs * batch["completion_mask"][:, 1:]).sum(1), batch["valid"])
