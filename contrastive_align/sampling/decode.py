"""Token ids drawn from a model's own distribution, with the log-probs of that distribution.

The default is plain sampling: temperature 1, no top-p, no top-k, no penalties, whatever the generation config says.
``temperature``, ``top_k``, ``top_p`` and ``suppress_ids`` change the distribution; the log-probs are then those of
the changed one.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from contrastive_align.models.loading import decoder_start_token
from contrastive_align.sampling.adjust import Adjustment, Support
from contrastive_align.sampling.noise import exponential_noise


KEEP_ENDED = 0.25  # ended rows are dropped at a larger share: dropping copies the cache of the running rows
SCORED_AT_ONCE = 2**24  # logits in memory at once when completions are scored
LOOK_EVERY = {"cpu": 1}  # steps between two looks at which rows still run; other devices would wait for each
LOOK_EVERY_ELSEWHERE = 8
CACHE_ROOM = 64  # tokens by which a full KV cache grows


@dataclass(frozen=True)
class Drawn:
    """K completions of each of C prompts.

    The log-probs are summed over the completion's tokens, EOS included, under the distribution that was drawn from,
    after ``suppress_ids``, ``temperature``, ``top_k`` and ``top_p``.
    """

    completion_ids: list[list[list[int]]]  # C x K lists of token ids, EOS included where it was drawn
    logps: Tensor  # (C, K) float64 nats
    truncated: Tensor  # (C, K) bool: max_new_tokens came before EOS
    supports: list[list[Support]] | None = None  # C x K, if asked for: the tokens that each token was chosen from
    inside: Tensor | None = None  # (C, K) bool, if asked for: whether ``watched`` leaves every token of the sample


@torch.no_grad()
def draw(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    *,
    per_prompt: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    seeds: Sequence[int],
    rows_at_once: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    suppress_ids: Sequence[int] = (),
    supports: bool = False,
    watched: Adjustment | None = None,
) -> Drawn:
    r"""Draw completions token by token; each prompt is computed once for all of its samples.

    .. math:: y_t = \arg\max_v \, \pi(v | x, y_{<t}) / E_{t,v}, \quad E_{t,v} \sim \text{Exponential}(1)

    which has the distribution :math:`\pi`, the model's own unless ``temperature``, ``top_k``, ``top_p`` (see
    :class:`~contrastive_align.sampling.adjust.Adjustment`) or ``suppress_ids`` changes it: the first of competing
    exponential clocks (the Gumbel-max trick without its logarithms). Sample k of a prompt has its own noise, a function
    of the prompt's seed, k, t and v (:func:`~contrastive_align.sampling.noise.exponential_noise`). Its token ids do not
    depend on the rest of the batch, on the process or on resuming, except for near-ties that rounding decides. The
    global random state is neither read nor changed.

    Args:
        model: a transformers model, with or without PEFT. A causal model continues the prompt; an encoder-decoder model
            reads it in the encoder. Without a KV cache, every step computes the whole row again. Dropout is off.
        prompt_ids, seeds: C prompts, not empty, with a seed each.
        per_prompt: K samples of each prompt.
        eos_token_ids, pad_token_id: tokens that end a completion, perhaps none; and any token of the vocabulary.
        rows_at_once: the most samples that are decoded together.
        suppress_ids: tokens that are never drawn. They are removed first, so that ``top_p`` is a share of the rest.
        supports: whether to return the tokens that each token was chosen from.
        watched: another change of the distribution, which is not drawn from: what it would leave of each sample is
            returned as ``inside``.

    Returns:
        :class:`Drawn`. With the defaults its log-probs are the model's own; otherwise :func:`score` gives these.

    Raises:
        ValueError: no seed for a prompt, a prompt that is empty or too long for the model, NaN logits, or a
            temperature, top_k, top_p or suppressed token outside its range.
        NotImplementedError: a prompt-tuning adapter.
    """
    if per_prompt < 1 or max_new_tokens < 1 or rows_at_once < 1:
        raise ValueError(
            f"per_prompt={per_prompt}, max_new_tokens={max_new_tokens}, rows_at_once={rows_at_once}: expected at least "
            "1 each."
        )
    if len(seeds) != len(prompt_ids):
        raise ValueError(f"{len(seeds)} seeds for {len(prompt_ids)} prompts, expected one for each.")
    interface = _ModelInterface.of(model)
    interface.check_lengths([len(ids) for ids in prompt_ids], max_new_tokens)
    adjustment = Adjustment(temperature, top_k, top_p)
    suppressed = _checked_ids(interface, suppress_ids)
    adjust = partial(adjustment.apply, suppressed=suppressed) if adjustment.changes or len(suppressed) else None
    sample_seeds = [_sample_seeds(seed, per_prompt) for seed in seeds]
    shape = (len(prompt_ids), per_prompt)
    completion_ids: list[list[Any]] = [[None] * per_prompt for _ in prompt_ids]
    kept: list[list[Any]] = [[None] * per_prompt for _ in prompt_ids]
    logps = torch.zeros(shape, dtype=torch.float64)
    truncated, inside = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    extra = {"adjust": adjust, "watched": watched, "supports": supports}
    whole_prompts = rows_at_once // per_prompt * per_prompt or rows_at_once
    with _evaluation_mode(model):
        for prompts in interface.batchable_rows([len(ids) for ids in prompt_ids]):
            rows = [(c, k) for c in prompts for k in range(per_prompt)]
            for i in range(0, len(rows), whole_prompts):
                part = rows[i : i + whole_prompts]
                decoder = interface.start(model, prompt_ids, [c for c, _ in part], pad_token_id)
                part_seeds = [sample_seeds[c][k] for c, k in part]
                done = _decode(decoder, part_seeds, max_new_tokens, eos_token_ids, pad_token_id, **extra)
                at = torch.tensor(part).unbind(1)
                logps[at], truncated[at], inside[at] = done.logps.cpu(), done.truncated.cpu(), done.inside.cpu()
                for table, found in ((completion_ids, done.ids), (kept, done.supports or [])):
                    for (c, k), row in zip(part, found, strict=False):
                        table[c][k] = row
    if not torch.isfinite(logps).all():
        c, k = (~torch.isfinite(logps)).nonzero()[0].tolist()
        raise ValueError(
            f"Sample {k} of prompt {c} has the log-prob {logps[c, k].item()}: the model's logits are not finite. Its "
            "weights hold NaN, its precision is too low, or training diverged (lower learning_rate)."
        )
    return Drawn(completion_ids, logps, truncated, kept if supports else None, None if watched is None else inside)


@torch.no_grad()
def score(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    rows_at_once: int = 256,
) -> Tensor:
    """Return the log-prob of each completion given its prompt, (n,) float64 nats, summed over its tokens.

    Dropout is off and there is no gradient; the model is left unchanged. Completions must not be empty.
    """
    interface = _ModelInterface.of(model)
    lengths = [len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    interface.check_lengths([len(ids) for ids in prompt_ids], max(map(len, completion_ids), default=1))
    logps = torch.zeros(len(lengths), dtype=torch.float64)
    vocabulary = interface.vocabulary
    with _evaluation_mode(model):
        for alike in interface.batchable_rows(lengths):
            longest = max(len(completion_ids[i]) for i in alike)
            size = max(1, min(rows_at_once, SCORED_AT_ONCE // (vocabulary * (longest + 1))))
            for i in range(0, len(alike), size):
                rows = alike[i : i + size]
                labels = [list(completion_ids[r]) for r in rows]
                prompts = [list(prompt_ids[r]) for r in rows]
                logps[rows] = _score_rows(model, interface, prompts, labels, pad_token_id).cpu()
    return logps


def seed_of(*parts: Any) -> int:
    """Return a seed below 2^63 for these parts, the same in every process and after resuming.

    >>> seed_of(0, "round", 1, 17) == seed_of(0, "round", 1, 17) != seed_of(0, "round", 2, 17)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") % 2**63


def distinct_n(token_lists: Sequence[Sequence[int]], n: int) -> float:
    """Return the number of different n-grams over the number of all n-grams; NaN where there are none.

    A measure of diversity: distinct-n, arXiv:1510.03055. An n-gram lies within one completion.

    >>> distinct_n([[1, 2, 1, 2], [1, 2]], 2)
    0.5
    """
    grams = [tuple(ids[i : i + n]) for ids in token_lists for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


class _Rows(NamedTuple):
    """Rows that were decoded together; the fields are those of :class:`Drawn`."""

    ids: list[list[int]]
    logps: Tensor
    truncated: Tensor
    supports: list[Support] | None
    inside: Tensor


def _decode(
    decoder: _Decoder,
    seeds: list[int],
    steps: int,
    eos: Sequence[int],
    pad: int,
    *,
    adjust: Callable[[Tensor], Tensor] | None,
    watched: Adjustment | None,
    supports: bool,
) -> _Rows:
    """Decode one row for each seed."""
    device, n = decoder.logits.device, len(seeds)
    own_seeds = torch.tensor(seeds, device=device)
    looks = LOOK_EVERY.get(device.type, LOOK_EVERY_ELSEWHERE)
    ends = torch.tensor(list(eos), dtype=torch.long, device=device)
    ids = torch.full((n, steps), pad, device=device)
    logps = torch.zeros(n, dtype=torch.float64, device=device)
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    truncated, inside = torch.zeros(n, dtype=torch.bool, device=device), torch.ones(n, dtype=torch.bool, device=device)
    chosen_from: list[tuple[Tensor, Tensor]] = []  # of each step: places in the (n, steps) table, and token ids
    # The decoder's rows: their places among the n, and whether they still run.
    rows, running = torch.arange(n, device=device), torch.ones(n, dtype=torch.bool, device=device)
    for step in range(steps):
        logits = decoder.logits if adjust is None else adjust(decoder.logits)
        tokens, token_logps = _sample_tokens(logits, exponential_noise(own_seeds[rows], step, logits.size(-1)))
        tokens = torch.where(running, tokens, pad)
        ids[rows, step] = tokens
        logps[rows] += token_logps.masked_fill(~running, 0.0)
        lengths[rows] += running
        if supports:
            row, token = (torch.isfinite(logits) & running.unsqueeze(-1)).nonzero().unbind(1)
            chosen_from.append((rows[row] * steps + step, token.int()))
        if watched is not None:
            left = watched.apply(decoder.logits).gather(-1, tokens.unsqueeze(-1)).squeeze(-1) > -torch.inf
            inside[rows] &= left | ~running
        running = running & ~torch.isin(tokens, ends)
        if step + 1 == steps:
            break
        if (step + 1) % looks == 0:
            kept = running.nonzero().flatten()
            if not len(kept):
                break
            if len(kept) < (1 - KEEP_ENDED) * len(running):
                rows, running, tokens = rows[kept], running[kept], tokens[kept]
                decoder.select(kept)
        decoder.step(tokens)
    truncated[rows] = running
    of_rows = zip(ids.tolist(), lengths.tolist(), strict=True)
    found = _supports_of_rows(chosen_from, lengths, steps) if supports else None
    return _Rows([row[:length] for row, length in of_rows], logps, truncated, found, inside)


def _supports_of_rows(chosen_from: Sequence[tuple[Tensor, Tensor]], lengths: Tensor, steps: int) -> list[Support]:
    """Sort what each step chose from by rows and steps; return the support of each row, on the CPU."""
    places, ids = (torch.cat(parts) for parts in zip(*chosen_from, strict=True))
    order = places.argsort(stable=True)
    sizes = torch.bincount(places, minlength=len(lengths) * steps).view(-1, steps).cpu()
    each = zip(sizes, lengths.tolist(), ids[order].cpu().split(sizes.sum(1).tolist()), strict=True)
    return [Support(size[:length], own) for size, length, own in each]


def _score_rows(
    model: nn.Module, interface: _ModelInterface, prompts: list[list[int]], completions: list[list[int]], pad: int
) -> Tensor:
    device, longest = interface.base.device, max(map(len, completions))
    if interface.encoder_decoder:
        ids, mask = _pad_rows(prompts, pad, "right", device)
        labels, scored = _pad_rows(completions, pad, "right", device)
        inputs, _ = _pad_rows([[interface.start_token, *row[:-1]] for row in completions], pad, "right", device)
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=inputs, use_cache=False).logits
    else:
        rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        ids, mask = _pad_rows(rows, pad, "left", device)
        logits = model(**interface.inputs(ids, mask, keep=longest + 1), use_cache=False).logits[:, -longest - 1 : -1]
        labels, scored = ids[:, -longest:], _pad_rows(completions, pad, "left", device)[1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1).double() - logits.logsumexp(-1).double()
    return logps.masked_fill(scored == 0, 0.0).sum(-1)


def _checked_ids(interface: _ModelInterface, suppress_ids: Sequence[int]) -> Tensor:
    """Return the ids of the suppressed tokens, or raise ValueError."""
    suppressed = sorted(set(suppress_ids))
    if suppressed:
        vocabulary = interface.vocabulary
        outside = [i for i in suppressed if not 0 <= i < vocabulary]
        if outside or len(suppressed) == vocabulary:
            found = f"id {outside[0]}" if outside else "all of them"
            raise ValueError(f"suppress_ids has {found}, and {type(interface.base).__name__} has {vocabulary} tokens.")
    return torch.tensor(suppressed, dtype=torch.long, device=interface.base.device)


def _sample_tokens(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample n tokens from (n, V) logits and exponential noise; return them and their log-probs in float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    top = logits.max(-1, keepdim=True).values
    weights = (logits - top).exp_()
    total = weights.sum(-1)
    tokens = weights.div_(noise).argmax(-1)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)) - top
    return tokens, chosen.squeeze(-1).double() - total.double().log()


def _sample_seeds(seed: int, n: int) -> list[int]:
    """Return n seeds made from one; a larger n only appends."""
    return torch.randint(2**63 - 1, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class _ModelInterface:
    """What a model's forward accepts and supports."""

    base: PreTrainedModel  # without PEFT's wrapper
    takes: frozenset[str]  # the arguments of its forward
    cached: bool  # whether it has a KV cache (or states) whose rows can be selected
    padded: bool  # whether prompts of different lengths may share a batch; recurrent states may see the padding
    encoder_decoder: bool
    start_token: int | None  # the decoder's first

    @classmethod
    def of(cls, model: nn.Module) -> _ModelInterface:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise NotImplementedError(
                f"{type(model).__name__} has a prompt-tuning adapter (virtual tokens), which is not sampled from here. "
                "Use LoRA, or merge it into a model."
            )
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # Of the class: a head that was added to the instance takes any argument.
        takes = frozenset(inspect.signature(type(base).forward).parameters)
        cached = "past_key_values" in takes and base._supports_default_dynamic_cache()
        encoder_decoder = bool(base.config.is_encoder_decoder)
        start = decoder_start_token(base) if encoder_decoder else None
        if encoder_decoder and not cached:
            raise NotImplementedError(f"{type(base).__name__} has no cache, which an encoder-decoder model needs here.")
        return cls(base, takes, cached, cached and not base._is_stateful, encoder_decoder, start)

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        weight = self.base.get_output_embeddings().weight
        return int(getattr(weight, "ds_shape", weight.shape)[0])  # of which ZeRO-3 keeps a part here

    def check_lengths(self, prompts: list[int], new: int) -> None:
        if 0 in prompts:
            raise ValueError(f"Prompt {prompts.index(0)} has no tokens, expected at least one (such as BOS).")
        room = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        for c, length in enumerate(prompts):
            needed = max(length, new) if self.encoder_decoder else length + new
            if room is not None and needed > room:
                raise ValueError(
                    f"Prompt {c} has {length} tokens and max_new_tokens is {new}: {needed} positions, and "
                    f"{type(self.base).__name__} has {room}. Shorten the prompt, or draw fewer tokens."
                )

    def batchable_rows(self, lengths: list[int]) -> list[list[int]]:
        """Return lists of row numbers that may share batches, sorted by length."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        if self.padded:
            return [order] if order else []
        return [list(rows) for _, rows in itertools.groupby(order, key=lambda i: lengths[i])]

    def inputs(self, ids: Tensor, mask: Tensor, keep: int) -> dict[str, Tensor | int]:
        """Return the arguments for a causal model's forward, without those that it does not take."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        return {"input_ids": ids} | {name: value for name, value in given.items() if name in self.takes}

    def start(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], prompts: list[int], pad: int) -> _Decoder:
        """Return a decoder with a row for each entry of ``prompts``; consecutive equal prompts are computed once."""
        distinct = [c for c, _ in itertools.groupby(prompts)]
        side = "right" if self.encoder_decoder else "left"
        decoder = _Decoder(model, self, *_pad_rows([prompt_ids[c] for c in distinct], pad, side, self.base.device))
        if len(prompts) > len(distinct):
            place = {c: i for i, c in enumerate(distinct)}
            decoder.select(torch.tensor([place[c] for c in prompts], device=self.base.device))
        if self.cached:
            preallocate_cache(decoder.cache)
        return decoder


class _Decoder:
    """Rows that are decoded together; ``logits`` (rows, V) are those of the next token.

    An encoder-decoder model reads the prompts ``ids`` in its encoder. Without a cache, every step computes whole rows.
    """

    def __init__(self, model: nn.Module, interface: _ModelInterface, ids: Tensor, mask: Tensor) -> None:
        self.model, self.interface, self.mask = model, interface, mask
        self.cache = self.encoded = None
        if interface.encoder_decoder:
            self.encoded = interface.base.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)[0]
            ids = ids.new_full((len(ids), 1), interface.start_token)
        self.ids = None if interface.cached else ids
        self._forward(ids)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order and with repetitions."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        for name in ("ids", "mask", "encoded", "logits"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[rows])

    def step(self, tokens: Tensor) -> None:
        tokens = tokens.unsqueeze(-1)
        if self.encoded is None:
            self.mask = F.pad(self.mask, (0, 1), value=1)
        if not self.interface.cached:
            self.ids = tokens = torch.cat([self.ids, tokens], 1)
        self._forward(tokens)

    def _forward(self, ids: Tensor) -> None:
        """Compute ``logits`` from the tokens that the cache does not hold yet."""
        if self.encoded is None:
            inputs = self.interface.inputs(ids, self.mask, keep=1)
            if "position_ids" in inputs:
                inputs["position_ids"] = inputs["position_ids"][:, -ids.size(1) :]
        else:
            encoder_outputs = BaseModelOutput(last_hidden_state=self.encoded)
            inputs = {"decoder_input_ids": ids, "encoder_outputs": encoder_outputs, "attention_mask": self.mask}
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        outputs = self.model(**inputs, use_cache=self.interface.cached)
        self.cache = outputs.past_key_values if self.interface.cached else None
        self.logits = outputs.logits[:, -1]


def preallocate_cache(cache: Cache) -> None:
    """Replace the growing layers of a cache by preallocated ones; all other layers have a fixed size."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache  # the cross-attention cache does not grow
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[i] = _PreallocatedLayer(layer)


class _PreallocatedLayer(DynamicLayer):
    """A layer that writes a step's token in place instead of copying all earlier ones.

    ``keys`` and ``values`` are views of the used part of two larger buffers (rows, heads, room, size).
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = layer.keys, layer.values
        self._buffers = (layer.keys, layer.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        used = self.keys.size(-2)
        end = used + key_states.size(-2)
        if end > self._buffers[0].size(-2):
            grown = (x.new_empty(*x.shape[:2], end + CACHE_ROOM, x.size(-1)) for x in self._buffers)
            self._buffers = tuple(grown)
            for store, old in zip(self._buffers, (self.keys, self.values), strict=True):
                store[:, :, :used] = old
        for store, new in zip(self._buffers, (key_states, value_states), strict=True):
            store[:, :, used:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order and with repetitions."""
        self._buffers = tuple(store.index_select(0, beam_idx.to(store.device)) for store in self._buffers)
        self.keys, self.values = (store[:, :, : self.keys.size(-2)] for store in self._buffers)


def _pad_rows(rows: Sequence[Sequence[int]], pad: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows to one length; return (n, L) ids and mask.

    >>> _pad_rows([[1, 2], [3]], 0, "left", "cpu")
    (tensor([[1, 2],
            [0, 3]]), tensor([[1, 1],
            [0, 1]]))
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and compilation off (each cache length would compile again); restore every module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
