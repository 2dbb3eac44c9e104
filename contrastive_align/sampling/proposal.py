"""Proposals that sample from a model: the tuned policy, the base, or the base with a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.sampling.adjust import Adjustment
from contrastive_align.sampling.decode import draw, score
from contrastive_align.sampling.samples import Samples


PLAIN = Adjustment()  # the model's own distribution


class PolicyProposal:
    """A proposal that samples from a model and reports log-probs under the model and under the base.

    The base is ``base`` if given, else a PEFT model with its adapter off, else the model itself; it never sees
    ``prefix``. Every call draws fresh samples, with noise from the seed and the number of earlier calls, which
    ``state_dict`` holds. ``drawn`` and ``truncated`` count the samples and those that ``max_new_tokens`` cut.

    Args:
        model, rows_at_once: see :func:`~contrastive_align.sampling.decode.draw`; the model is left on its device.
        base: another model of the same vocabulary and tokenizer.
        max_new_tokens: longer completions are cut there, without EOS; the log-prob is that of the tokens kept.
        seed: of the noise; different in each process if each has its own prompts.
        prefix: put before each prompt: text, or messages for conversational prompts.
        eos_token_ids: tokens that end a completion. Default: the tokenizer's EOS.
        adjustment: temperature, top-k and top-p of what is drawn, whose log-probs ``logps`` then are.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base: nn.Module | None = None,
        max_new_tokens: int,
        seed: int = 0,
        prefix: str | list[dict[str, Any]] = "",
        eos_token_ids: Sequence[int] | None = None,
        rows_at_once: int = 256,
        adjustment: Adjustment = PLAIN,
    ) -> None:
        self.model, self.tokenizer, self.base = model, tokenizer, base
        self.max_new_tokens, self.seed, self.prefix, self.rows_at_once = max_new_tokens, seed, prefix, rows_at_once
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_token_ids = eos if eos_token_ids is None else list(eos_token_ids)
        self.pad_token_id = next((i for i in (tokenizer.pad_token_id, *self.eos_token_ids) if i is not None), 0)
        self.adjustment = adjustment
        self.calls = self.drawn = self.truncated = 0
        if base is None and getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"{type(model).__name__} has an adapter that transformers loaded. Wrap the model with peft's "
                "PeftModel, whose adapter can be taken off, or pass base=."
            )

    def sample(self, prompts: Sequence[Any], n: int) -> Samples:
        """Draw n samples for each prompt (text, or messages), prompt by prompt.

        ``completion_ids`` are the tokens drawn, even if their text would be encoded in another way.
        """
        plain = seen = [tokenise_prompt(prompt, self.tokenizer) for prompt in prompts]
        if self.prefix:
            seen = [tokenise_prompt(_join(self.prefix, prompt), self.tokenizer) for prompt in prompts]
        seeds = np.random.SeedSequence([self.seed, self.calls]).generate_state(len(prompts), np.uint64)
        drawn = draw(
            self.model,
            seen,
            per_prompt=n,
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            seeds=[int(s) for s in seeds],
            rows_at_once=self.rows_at_once,
            **vars(self.adjustment),
        )
        self.calls += 1
        self.drawn += drawn.truncated.numel()
        self.truncated += int(drawn.truncated.sum())
        ids = [row for rows in drawn.completion_ids for row in rows]
        index = torch.arange(len(prompts)).repeat_interleave(n)
        texts = zip(self.tokenizer.batch_decode(ids, skip_special_tokens=True), index.tolist(), strict=True)
        completions = [t if isinstance(prompts[i], str) else [{"role": "assistant", "content": t}] for t, i in texts]
        logps = drawn.logps.flatten()
        base_logps = logps if self._is_base else self._score_base([plain[i] for i in index.tolist()], ids)
        return Samples(index, ids, completions, logps, base_logps)

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls, "drawn": self.drawn, "truncated": self.truncated}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls, self.drawn, self.truncated = state["calls"], state["drawn"], state["truncated"]

    @property
    def _is_base(self) -> bool:
        plain = not self.prefix and not self.adjustment.changes
        return plain and self.base is None and not is_peft_model(self.model)

    def _score_base(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> torch.Tensor:
        options = {"pad_token_id": self.pad_token_id, "rows_at_once": self.rows_at_once}
        adapter_off = self.base is None and is_peft_model(self.model)
        with _without_adapter(self.model) if adapter_off else nullcontext():
            return score(self.model if self.base is None else self.base, prompt_ids, completion_ids, **options)


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, was in trained:  # PEFT makes an adapter trainable when it switches it on
            parameter.requires_grad_(was)


def _join(prefix: Any, prompt: Any) -> Any:
    if isinstance(prefix, str) == isinstance(prompt, str):
        return prefix + prompt if isinstance(prompt, str) else [*prefix, *prompt]
    raise TypeError(
        f"prefix is a {type(prefix).__name__} and the prompt a {type(prompt).__name__}, expected text before text, or "
        "messages before messages."
    )
