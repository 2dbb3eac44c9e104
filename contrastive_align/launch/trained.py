"""A model that is asked: loaded from a folder or hub id, whole or as an adapter, with its prompts and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from contrastive_align.conditions import Condition
from contrastive_align.conditions.conditions import FILE
from contrastive_align.data.formats import Text
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.launch.ask import load_trained, sample_trained, search_trained
from contrastive_align.launch.past_run import chats, read_summary
from contrastive_align.launch.quiet import quiet_run
from contrastive_align.models.loading import context_length
from contrastive_align.sampling.decode import seed_of


GREEDY = 1e-9  # a top_p that leaves the likeliest token alone


class Trained:
    """A model with its tokenizer and its best condition, if it has one.

    Args:
        name: a folder or hub id of a model or of an adapter.
        seed: of all samples.
    """

    def __init__(self, name: str, *, dtype: str = "auto", trust_remote_code: bool = False, seed: int = 42) -> None:
        quiet_run(on_cpu=torch.accelerator.current_accelerator() is None)
        model, self.tokenizer = load_trained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        self.name, self.seed = name, seed
        self.model = model.to(torch.accelerator.current_accelerator() or "cpu").eval()
        self.condition = Condition.load(name) if (Path(name) / FILE).is_file() else None

    @property
    def short_name(self) -> str:
        """The last part of the name."""
        return Path(self.name).name or self.name

    @property
    def chats(self) -> bool:
        """Whether a text is asked as a user's message (see :func:`~contrastive_align.launch.past_run.chats`)."""
        return chats(read_summary(self.name), self.tokenizer)

    @property
    def context(self) -> int | None:
        """The number of tokens that its positions are made for; None if it is unknown."""
        return context_length(self.model)

    def ids_of(self, prompt: Text) -> list[int]:
        """Token ids of a prompt, with the best condition before it."""
        return tokenise_prompt(prompt if self.condition is None else self.condition.apply_best(prompt), self.tokenizer)

    def positions(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Return how many tokens of the context a prompt and its completion take."""
        if self.model.config.is_encoder_decoder:  # each has a context of its own
            return max(prompt_tokens, completion_tokens)
        return prompt_tokens + completion_tokens

    def answer(
        self,
        prompts: Sequence[Text],
        numbers: Sequence[Any],
        *,
        per_prompt: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_beams: int = 1,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[list[list[str]], list[list[bool]]]:
        """Sample answers; a temperature of 0 takes the likeliest token.

        Args:
            prompts: texts or messages.
            numbers: of the prompts, which decide with the seed what is drawn.
            num_beams: above 1, the best completions of beam search, and nothing is drawn.
            rows: of the prompts, for a model that reads more of them than the prompt.

        Returns:
            The texts of each prompt, and which of them ended by themselves.
        """
        tokens = [] if self.condition is None else self.condition.tokens
        if temperature == 0:
            temperature, top_p = 1.0, GREEDY
        ids = [self.ids_of(prompt) for prompt in prompts]
        same = {"per_prompt": per_prompt, "max_new_tokens": max_new_tokens}
        if num_beams > 1:
            return search_trained(self.model, self.tokenizer, ids, tokens, num_beams=num_beams, **same)
        return sample_trained(
            self.model,
            self.tokenizer,
            ids,
            tokens,
            **same,
            seeds=[seed_of(self.seed, "sample", number) for number in numbers],
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
