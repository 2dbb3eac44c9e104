"""Sequence classifiers as features: the score of a reward model, or the probability of a label."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_align.targets.evaluate import Feature, FeatureError, Text, completion_text, shorten


logger = logging.getLogger(__name__)

SCORER_OPTIONS = ("revision", "reads", "batch_size", "max_length", "device", "trust_remote_code")  # of both kinds
NO_LIMIT = 10**6  # tokenizers without a limit say something like 1e30


def reward_model(value: Any, *, special_tokens: bool = False, **options: Any) -> Feature:
    """Build the feature of a reward model, from its id or folder; see :class:`SequenceScorer` for the options."""
    _check_model_id("reward_model", value)
    return Feature(SequenceScorer(value, special_tokens=special_tokens, **options), _last_part(value), boolean=False)


def classifier(
    value: Any, *, label: str | int | None = None, threshold: float | None = None, reads="completion", **options: Any
) -> Feature:
    """Build the feature of a label's probability, or with ``threshold`` of whether it is reached."""
    _check_model_id("classifier", value)
    if label is None:
        raise ValueError(f"The classifier {value} needs a label: {{classifier: {value}, label: positive}}.")
    name = f"{_last_part(value)}:{label}" + (f">={threshold:g}" if isinstance(threshold, (int, float)) else "")
    scorer = SequenceScorer(value, label=label, threshold=threshold, reads=reads, special_tokens=True, **options)
    return Feature(scorer, name, boolean=threshold is not None)


def loaded_reward_model(model: torch.nn.Module, tokenizer: Any = None) -> Feature:
    """Build the feature of a reward model that is already loaded."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return Feature(SequenceScorer(model, tokenizer=tokenizer), _last_part(name), boolean=False)


def _check_model_id(kind: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{kind}: found {shorten(value)}, expected a model id or folder.")
    if value.endswith(".py"):
        raise ValueError(f"{kind}: found {value!r}, a Python file. Name the function in it: '{value}:function'.")
    if value.startswith((".", "/", "~")) and not Path(value).is_dir():
        raise ValueError(f"{kind}: there is no folder {value!r} (looked in {Path.cwd()}).")


def _last_part(model_id: str) -> str:
    return model_id.rstrip("/").split("/")[-1]


@dataclass(eq=False, repr=False)
class SequenceScorer:
    """A reward function that runs a sequence classifier in batches, sorted by length.

    The value is the only logit (``label`` None), the probability of ``label``, or with ``threshold`` 1 where that
    probability reaches it and else 0. The model is loaded at the first call.

    ``reads="both"``: prompt and completion, joined as TRL joins them for a reward model (a dialogue through the chat
    template); ``"completion"``: the completion's text alone. Texts of more than ``max_length`` tokens lose their
    beginning, and a warning counts them once.
    """

    model: str | torch.nn.Module  # an id, a folder, or a loaded model
    _: KW_ONLY
    tokenizer: Any = None  # default: the one saved with the model
    revision: str | None = None
    label: str | int | None = None  # a label of the model's config, or its number
    threshold: float | None = None  # between 0 and 1
    reads: str = "both"
    special_tokens: bool = False  # whether the tokenizer adds its own to plain text; TRL does not for reward models
    device: str | torch.device | None = None  # default: the current CUDA device if there is one, else the CPU
    batch_size: int = 32
    max_length: int | None = None  # default: the model's
    trust_remote_code: bool = False  # whether the model's repository may run code of its own

    def __post_init__(self) -> None:
        if self.reads not in ("both", "completion"):
            raise ValueError(f"reads is {self.reads!r}, expected 'both' (prompt and completion) or 'completion'.")
        if self.threshold is not None and not (isinstance(self.threshold, (int, float)) and 0 < self.threshold < 1):
            raise ValueError(f"threshold is {self.threshold!r}, expected a probability between 0 and 1.")
        if not (isinstance(self.batch_size, int) and self.batch_size > 0):
            raise ValueError(f"batch_size is {self.batch_size!r}, expected a whole number above 0.")
        self._ready = self._warned_of_truncation = False

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        self._load()
        texts = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
        # Templates write their own special tokens.
        special = self.special_tokens and not (self.reads == "both" and not isinstance(prompts[0], str))
        ids = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        too_long = sum(len(row) > self.max_length for row in ids)
        if too_long and not self._warned_of_truncation:
            logger.warning(
                f"{too_long} of {len(ids)} texts are longer than the {self.max_length} tokens that {self._id} reads: "
                "they lose their beginning, in later calls too."
            )
            self._warned_of_truncation = True
        values = torch.empty(len(texts), dtype=torch.float64)
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows],
                add_special_tokens=special,
                truncation=bool(too_long),
                max_length=self.max_length if too_long else None,
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
            with torch.inference_mode():
                values[rows] = self._value(self.model(**batch.to(self.model.device)).logits).cpu()
        self.tokenizer.truncation_side = side
        return values.tolist()

    def _value(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        if self.label is None:
            return logits[:, 0]
        several = getattr(self.model.config, "problem_type", None) == "multi_label_classification"
        p = torch.sigmoid(logits) if several or logits.size(-1) == 1 else torch.softmax(logits, -1)
        p = p[:, self._column]
        return p if self.threshold is None else (p >= self.threshold).double()

    def _text(self, prompt: Text, completion: Text) -> str:
        if self.reads == "completion":
            return completion_text(completion)
        if isinstance(prompt, str):
            return prompt + completion_text(completion)
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)

    def _load(self) -> None:
        if self._ready:
            return
        from transformers import AutoTokenizer

        if isinstance(self.model, torch.nn.Module):
            self._id = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        else:
            self._id = self.model
            self.model = self._from_pretrained(self.model)
            current = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
            self.model.to(self.device or current)
        self.model.eval()
        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(
                self._id, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        config = self.model.config.get_text_config()
        if config.pad_token_id is None:  # with it the model finds the last token of a padded row
            config.pad_token_id = self.tokenizer.pad_token_id
        limits = [self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        limit = min((n for n in limits if n and n < NO_LIMIT), default=NO_LIMIT)
        self.max_length = min(self.max_length or limit, limit)
        self._check_labels()
        self._ready = True

    def _from_pretrained(self, model_id: str) -> torch.nn.Module:
        from transformers import AutoModelForSequenceClassification

        options = {"revision": self.revision, "trust_remote_code": self.trust_remote_code, "output_loading_info": True}
        if self.label is None:
            options["num_labels"] = 1
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(model_id, **options)
        except RuntimeError as error:
            if "size" not in str(error) and "mismatch" not in str(error):
                raise
            raise FeatureError(
                f"{model_id} does not load as a reward model with one score: {str(error).splitlines()[0]} For a "
                "classifier of several labels write {classifier: " + model_id + ", label: ...}."
            ) from error
        if report["missing_keys"]:
            raise FeatureError(
                f"{model_id} has no trained weights for {sorted(report['missing_keys'])}: they would be random. "
                "Expected a sequence classifier, found a model without its head."
            )
        return model

    def _check_labels(self) -> None:
        labels = self.model.config.label2id or {}
        if self.label is None:
            if self.model.config.num_labels != 1:
                raise FeatureError(
                    f"{self._id} has the labels {sorted(labels)}, expected one score. Choose one of them: "
                    "{classifier: ..., label: ...}."
                )
            return
        by_name = {name.lower(): number for name, number in labels.items()}
        column = self.label if isinstance(self.label, int) else by_name.get(str(self.label).lower())
        if isinstance(column, bool) or column is None or not 0 <= column < self.model.config.num_labels:
            raise FeatureError(f"{self._id} has no label {self.label!r}. Its labels: {', '.join(map(str, labels))}.")
        self._column = column
