"""Encoder-decoder models (T5, BART, Marian) as policies: the prompt in the encoder, the completion in the decoder.

The decoder reads its start token and the completion but for the last token, as the sampler draws it. What a model's
``generate`` forces or forbids besides (BART's first token, Marian's padding token) is not part of that distribution.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from contrastive_align.data.collate import to_table
from contrastive_align.models.head import call_head
from contrastive_align.models.layout import TOLERANCE
from contrastive_align.models.loading import decoder_start_token
from contrastive_align.models.logits_at_once import rows_at_once
from contrastive_align.models.logps import per_completion
from contrastive_align.models.noise import WIDER


TOLERANCE_16_BIT = 5e-2  # largest difference that counts as rounding, in nats per token


def check_options_for_encoder_decoder(args: Any) -> None:
    """Raise ValueError for options that would leave the model without its encoder, or were never tried with one."""
    for name, wrong in {
        "layout='shared'": args.layout == "shared",
        "use_vllm": args.use_vllm,
        "use_transformers_continuous_batching": args.use_transformers_continuous_batching,
    }.items():
        if wrong:
            raise ValueError(
                f"{name} is not supported for an encoder-decoder. Leave it out; the encoder reads a prompt once for "
                "all of its completions in any case."
            )


@dataclass
class EncoderDecoderCollator:
    """Batch groups of any K for an encoder-decoder. B prompts, N completions, row after row.

    - ``input_ids``, ``attention_mask`` (B, P): every prompt once
    - ``decoder_input_ids``, ``labels`` (N, L): start token + completion[:-1]; completion, -100 where there is none
    - ``prompt_of`` (N,): the prompt of each completion; ``valid`` (B, K): False where a group has fewer

    >>> batch = EncoderDecoderCollator(0, None, start_token_id=9)([
    ...     {"prompt_ids": [1, 2], "completion_ids": [[4], [5, 6]]}, {"prompt_ids": [3], "completion_ids": [[7, 8]]},
    ... ])
    >>> batch["input_ids"].tolist(), batch["prompt_of"].tolist()
    ([[1, 2], [3, 0]], [0, 0, 1])
    >>> batch["decoder_input_ids"].tolist(), batch["labels"].tolist()
    ([[9, 0], [9, 5], [9, 7]], [[4, -100], [5, 6], [7, 8]])
    """

    pad_token_id: int
    pad_to_multiple_of: int | None
    start_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [list(e["prompt_ids"]) for e in examples]
        completions = [list(ids) for e in examples for ids in e["completion_ids"]]
        shifted = [[self.start_token_id, *ids[:-1]] for ids in completions]
        return {
            "input_ids": self._pad(prompts, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(ids) for ids in prompts], 0),
            "decoder_input_ids": self._pad(shifted, self.pad_token_id),
            "labels": self._pad(completions, -100),
            "prompt_of": torch.tensor([i for i, e in enumerate(examples) for _ in e["completion_ids"]]),
            "valid": to_table([[True] * len(e["completion_ids"]) for e in examples], torch.bool),
        }

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        step = self.pad_to_multiple_of or 1
        width = -(-max(map(len, rows)) // step) * step
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def encoder_decoder_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    r"""(B, K) log pi(y|x) in nats, summed over the completion's tokens, EOS included; 0 where not ``valid``.

    .. math:: \log\pi(y|x) = \sum_t \log\pi(y_t | \mathrm{enc}(x), y_{<t})

    The encoder reads every prompt once for all of its completions; the head sees completion tokens alone.

    Args:
        model: went through :func:`add_encoder_decoder_head`, before PEFT or under it.
        batch: what :class:`EncoderDecoderCollator` returns.
    """
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    inputs = {name: batch[name] for name in names}
    log_probs = model(**inputs, completion_labels=batch["labels"], prompt_of=batch["prompt_of"])
    n, scored = len(batch["labels"]), batch["labels"] != -100
    completion_index = torch.arange(n, device=scored.device).repeat_interleave(scored.sum(1))
    return per_completion(log_probs.new_zeros(n).index_add(0, completion_index, log_probs), batch["valid"])


def other_encoder_decoder_batches(batch: dict[str, Tensor], rows: int, room: int) -> list[list[dict[str, Tensor]]]:
    """Return the completions of a batch in other batches: the first ``rows`` one by one, and twice with padding.

    ``room`` is the most columns of padding.
    """
    encoder, decoder = ("input_ids", "attention_mask"), ("decoder_input_ids", "labels")
    singles = []
    for i, n in enumerate(batch["labels"][:rows].ne(-100).sum(1).tolist()):
        prompt = batch["prompt_of"][i : i + 1]
        width = int(batch["attention_mask"][prompt].sum())
        one = {name: batch[name][prompt][:, :width] for name in encoder}
        one |= {name: batch[name][i : i + 1, :n] for name in decoder}
        valid = torch.ones_like(batch["valid"][:1, :1])
        singles.append({**one, "prompt_of": torch.zeros_like(prompt), "valid": valid})
    wider = max(0, min(WIDER, room))
    twice = {name: F.pad(batch[name].repeat(2, 1), (0, wider)) for name in (*encoder, "decoder_input_ids")}
    twice["labels"] = F.pad(batch["labels"].repeat(2, 1), (0, wider), value=-100)
    twice["prompt_of"] = torch.cat([batch["prompt_of"], batch["prompt_of"] + len(batch["input_ids"])])
    return [singles, [{**twice, "valid": batch["valid"].repeat(2, 1)}]]


def encoder_decoder_objective(model: nn.Module, batch: dict[str, Tensor], objective: Callable[..., Any]) -> Any:
    """Call ``objective`` on the decoder's tokens, as ``models.logps.completion_objective`` does."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    labels, prompt_of = batch["labels"], batch["prompt_of"]
    return model(**inputs, completion_labels=labels, prompt_of=prompt_of, token_objective=objective)


def add_encoder_decoder_head(model: PreTrainedModel) -> None:
    """Let ``model(..., completion_labels=, prompt_of=)`` return the log-probs of the labels, one after the other.

    With ``token_objective=fn`` it returns ``fn(hidden, labels, weight, bias)`` in their place.

    All of it inside the model's forward, where wrappers for several processes look for it.

    Raises:
        ValueError: these are not the log-probs of the model's own forward: an architecture that does more to its
            logits than scale them before the head and add ``final_logits_bias`` after it.
    """
    before = model.forward

    def forward(self, *args, completion_labels=None, prompt_of=None, token_objective=None, **kwargs):
        if completion_labels is None:
            return before(*args, **kwargs)
        mask = kwargs["attention_mask"]
        encoded = self.get_encoder()(input_ids=kwargs["input_ids"], attention_mask=mask, return_dict=True)[0]
        head = self.get_output_embeddings()
        with _input_of(head) as seen:
            before(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded[prompt_of]),
                attention_mask=mask[prompt_of],
                decoder_input_ids=kwargs["decoder_input_ids"],
                use_cache=False,
            )
        scored = completion_labels != -100
        hidden, labels = seen[0][scored], completion_labels[scored]
        added = getattr(self, "final_logits_bias", None)

        def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            bias = bias if added is None else added if bias is None else bias + added
            if token_objective is not None:
                return token_objective(hidden, labels, weight, bias)
            rows, _ = rows_at_once(hidden.device, len(weight))
            parts = zip(hidden.split(rows), labels.split(rows), strict=True)
            return torch.cat([checkpoint(_score, h, weight, bias, y, use_reentrant=False) for h, y in parts])

        return call_head(head, hidden, score)

    model.forward = types.MethodType(forward, model)
    _check(model)


@contextmanager
def _input_of(head: nn.Module):
    """Record the input of the head, and let the head compute one position only."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]):
        seen.append(args[0])
        return (args[0][:1, :1],)

    handle = head.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _score(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits if bias is None else logits + bias
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


@torch.no_grad()
def _check(model: PreTrainedModel) -> None:
    """Compare with the model's own forward: padded prompts, ragged completions of random tokens."""
    generator, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().weight.size(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    examples = [
        {"prompt_ids": tokens(5), "completion_ids": [tokens(3), tokens(6)]},
        {"prompt_ids": tokens(9), "completion_ids": [tokens(4), tokens(2)]},
    ]
    collate = EncoderDecoderCollator(model.config.get_text_config().pad_token_id or 0, None, decoder_start_token(model))
    batch = {name: tensor.to(model.device) for name, tensor in collate(examples).items()}
    was_training = model.training
    try:
        model.eval()
        found = encoder_decoder_logps(model, batch)
        rows, labels = batch["prompt_of"], batch["labels"]
        inputs = {"input_ids": batch["input_ids"][rows], "attention_mask": batch["attention_mask"][rows]}
        logits = model(**inputs, decoder_input_ids=batch["decoder_input_ids"], use_cache=False).logits
        log_probs = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        gap = (found.flatten() - log_probs.masked_fill(labels == -100, 0.0).sum(1)).abs() / (labels != -100).sum(1)
    finally:
        model.train(was_training)
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE_16_BIT)
    tolerance = TOLERANCE_16_BIT if getattr(model, "is_quantized", False) else max(tolerance, TOLERANCE[torch.float32])
    if not bool((gap <= tolerance).all()):
        raise ValueError(
            f"{type(model).__name__} does something to its logits that its head and final_logits_bias do not explain: "
            f"log-probs differ by {gap.max().item():.2g} nats per token from its own forward. It is not supported."
        )
