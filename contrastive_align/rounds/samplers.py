"""A round's completions from elsewhere: from vLLM through TRL's client, or from a server that holds the adapter."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedTokenizerBase

from contrastive_align.conditions import Condition
from contrastive_align.trl_seam import vllm_generation


WAY_OUT = "Leave use_vllm out"
# The strongest bias that vLLM's server takes. It is added before the temperature, which is at most 2: exp(-50) is left.
NEVER = -100.0

QUANTISED = (
    "use_vllm with a quantised model: TRL adds LoRA to the weights to hand them over, which rounds quantised ones, and "
    f"leaves their scales behind. Load the base in 16 bits. Or: {WAY_OUT.lower()}, and give "
    "sampler=ServerSampler(...), which hands over the adapter itself."
)


def check_vllm_options(args: Any, *, online: bool, sampler: Any, quantised: bool) -> None:
    """Check, before anything is loaded, that vLLM can sample for this run.

    Raises:
        ValueError: naming the option that does not go with ``use_vllm``, and the way out.
        ImportError: vLLM is not installed.
    """
    if not online:
        raise ValueError(f"use_vllm is set and nothing is sampled: the data has its completions. {WAY_OUT}.")
    if sampler is not None:
        raise ValueError("use_vllm is set and sampler is given: both would draw the completions. Give one of them.")
    if quantised:
        raise ValueError(QUANTISED)
    if not vllm_generation.is_vllm_available():
        raise ImportError(
            f"use_vllm is set and vLLM is not installed. Install it with `pip install trl[vllm]`. "
            f"Or: {WAY_OUT.lower()}."
        )


def check_vllm_tokens(
    condition: Condition, tokenizer: PreTrainedTokenizerBase, *, adapter: bool = False, rows: int | None = None
) -> None:
    """Check that vLLM, which has the vocabulary of the start, has the condition's tokens.

    Args:
        adapter: an adapter is trained, not the model.
        rows: of the model's embedding; None before it is loaded.

    Raises:
        ValueError: it does not.
    """
    known, tokens = tokenizer.get_vocab(), condition.tokens
    new = [token for token in tokens if token not in known or (rows is not None and known[token] >= rows)]
    way_out = "Or use condition='phrases', which needs no tokens."
    if new:
        raise ValueError(
            f"use_vllm with the condition '{condition.kind}', and the model lacks its token {new[0]!r}: vLLM serves "
            f"it with the vocabulary that it starts with. Start from a model that has the tokens already. {way_out}"
        )
    if tokens and adapter:
        raise ValueError(
            f"use_vllm with the condition '{condition.kind}' and LoRA: the rows of its tokens are trained beside the "
            f"adapter, and TRL does not hand these over. Train the whole model. {way_out}"
        )


def check_vllm_model(trainer: Any) -> None:
    """Check the model once it is loaded, and before vLLM is.

    Raises:
        ValueError: weights that TRL cannot hand to vLLM, or a model that vLLM cannot find.
    """
    model, args = trainer.model, trainer.args
    if getattr(model, "is_quantized", False):
        raise ValueError(QUANTISED)
    if is_peft_model(model):
        for config in model.peft_config.values():
            if getattr(config, "trainable_token_indices", None):
                raise ValueError(
                    "use_vllm with trainable_token_indices: TRL does not hand these rows over. Train the embedding "
                    f"with modules_to_save. Or: {WAY_OUT.lower()}."
                )
    if trainer.is_fsdp_enabled:
        raise ValueError("use_vllm under FSDP is not supported: parts of the weights would stay behind. Use DDP or "
                         f"DeepSpeed. Or: {WAY_OUT.lower()}.")  # fmt: skip
    if args.vllm_mode == "colocate" and not model.name_or_path:
        raise ValueError(
            "use_vllm loads the model a second time, by its name, and this one has none (model.name_or_path is empty). "
            "Save it and pass the folder, or use vllm_mode='server'."
        )


class VLLMSampler:
    """Draws completions of a :class:`~contrastive_align.ConditionalTrainer` with ``trl``'s ``VLLMGeneration``.

    Temperature, top-k, top-p, the longest length, what ends a completion and the condition tokens that are never drawn
    are those of sampling by the model itself. The random numbers are vLLM's own: a seed in a request would give all
    prompts of a round the same ones, and in ``colocate`` all completions of a prompt.

    Raises:
        ConnectionError: no server is there, within ``vllm_server_timeout``.
    """

    def __init__(self, trainer: Any) -> None:
        check_vllm_model(trainer)
        args = trainer.args
        self.accelerator, self.model = trainer.accelerator, trainer.model
        self.is_current = self.stays_current = False  # whether vLLM has the present weights; whether they may stay
        self.never, self.longest = frozenset(trainer.condition_ids), args.max_completion_length
        self.sleeps = args.vllm_mode == "colocate" and args.vllm_enable_sleep_mode
        self.filler = trainer.eos_token_ids[:1]
        plain = {"repetition_penalty": 1.0, "min_p": 0.0}  # whatever the generation config says
        own = {"stop_token_ids": list(trainer.eos_token_ids)}
        if self.never:
            own["logit_bias"] = dict.fromkeys(trainer.condition_ids, NEVER)
        self.generation = vllm_generation.VLLMGeneration(
            model=self.model,
            accelerator=self.accelerator,
            processing_class=trainer.processing_class,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.rows_at_once * args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            max_completion_length=args.max_completion_length,
            logprobs=None,
            generation_kwargs=own,
            **plain,
        )

    @contextlib.contextmanager
    def unchanged_weights(self) -> Iterator[None]:
        """Hand the weights over once for all that is drawn inside the block, in which they do not change."""
        self.is_current, self.stays_current = False, True
        try:
            yield
        finally:
            self.stays_current = False

    def __call__(self, prompts: list[list[int]], per_prompt: int) -> list[list[list[int]]]:
        """Draw ``per_prompt`` completions of each prompt, as token ids. Every process calls this, with its own prompts.

        vLLM takes as many prompts of every process: those that lack some draw completions that are thrown away.
        """
        most = max(gather_object([len(prompts)]))
        if not most:
            return []
        if self.sleeps or not (self.is_current and self.stays_current):  # vLLM that slept has lost its weights
            with base_kept(self.model):
                self.generation.sync_weights()
            self.is_current = True
        padded = prompts + [prompts[-1] if prompts else self.filler] * (most - len(prompts))
        _, drawn, _, _ = self.generation.generate(
            prompts=[ids for ids in padded for _ in range(per_prompt)], images=None, num_generations=per_prompt
        )
        if len(drawn) != most * per_prompt:
            raise RuntimeError(f"vLLM returned {len(drawn)} completions, expected {most} x {per_prompt}.")
        groups = [[list(ids) for ids in drawn[i * per_prompt : (i + 1) * per_prompt]] for i in range(len(prompts))]
        for ids in (ids for group in groups for ids in group):
            if not 0 < len(ids) <= self.longest:
                raise RuntimeError(f"vLLM returned a completion of {len(ids)} tokens, expected 1 to {self.longest}.")
            if drawn_tokens := self.never.intersection(ids):
                raise RuntimeError(
                    f"vLLM drew the condition token {min(drawn_tokens)}, against its logit_bias. Use "
                    f"condition='phrases'. Or: {WAY_OUT.lower()}."
                )
        return groups


@contextlib.contextmanager
def base_kept(model: nn.Module) -> Iterator[None]:
    """Restore the weights under an adapter afterwards, bit for bit.

    To hand over LoRA, TRL adds it to the weights and takes it out again. In 16 bits that leaves a rounding error, which
    adds up over the rounds: in the policy, and in the reference, which is the policy without its adapter.
    """
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    kept = [(p, p.detach().to("cpu", copy=True)) for layer in layers for p in layer.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)


def hand_over_without_rounding(generation: Any, model: nn.Module) -> None:
    """Wrap the hand-over of LoRA weights, which TRL calls from a private method, in :func:`base_kept`."""
    hand_over = generation.sync_weights

    def sync_weights() -> None:
        with base_kept(model):
            hand_over()

    generation.sync_weights = sync_weights


ADAPTER_FOLDER = "sampling_adapter"


def check_server_sampler(trainer: Any) -> None:
    """Raise ValueError where a server cannot be given the weights that are trained, or is never asked."""
    if not trainer.online:
        raise ValueError("sampler is given and nothing is sampled: the data has its completions. Leave it out.")
    if trainer.args.top_k:
        raise ValueError(
            f"top_k={trainer.args.top_k} with sampler: a request of OpenAI's form has no top_k. Leave it out, and give "
            "the sampler what its server takes: ServerSampler(..., extra_body={'top_k': ...})."
        )
    if not is_peft_model(trainer.model):
        raise ValueError(
            "sampler is given and the whole model is trained: a server can be handed an adapter while it runs, and not "
            "a whole model. Train LoRA (peft_config), or leave sampler out."
        )
    if trainer.condition.tokens:
        raise ValueError(
            f"sampler is given and the condition '{trainer.condition.kind}' adds tokens to the vocabulary, whose rows "
            "a server does not take with an adapter. Use condition='phrases', which adds none, or leave sampler out."
        )


class AdapterServer:
    """Draws completions on a server that is handed the policy's adapter whenever it has changed.

    Args:
        trainer: a :class:`~contrastive_align.ConditionalTrainer` on LoRA.
        sampler: a :class:`~contrastive_align.sampling.server.ServerSampler`.
    """

    def __init__(self, trainer: Any, sampler: Any) -> None:
        check_server_sampler(trainer)
        self.trainer, self.sampler = trainer, sampler
        self.pushed: str | None = None  # the adapter that the server has of this run

    def __call__(self, prompts: list[list[int]], per_prompt: int, seeds: list[int]) -> list[list[dict[str, Any]]]:
        """Draw completions. Texts are encoded again: an EOS follows where the server says that a completion ended.

        Every process calls this, also one without prompts: the adapter is saved by all of them together.
        """
        self._push_adapter()
        args, tokenizer = self.trainer.args, self.trainer.processing_class
        drawn = self.sampler(
            prompts,
            per_prompt=per_prompt,
            max_tokens=args.max_completion_length,
            seeds=seeds,
            temperature=args.temperature,
            top_p=args.top_p,
        )

        def row(text: str, finished: bool) -> dict[str, Any]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            finished = finished or not ids  # nothing but special tokens: an end
            return {"ids": ids + [tokenizer.eos_token_id] * finished, "text": text, "finished": finished}

        return [[row(c.text, c.finished) for c in group] for group in drawn]

    def _push_adapter(self) -> None:
        """Let the server have the present weights. The adapter's name says whose they are, of which step, and which."""
        trainer = self.trainer
        folder = Path(trainer.args.output_dir) / ADAPTER_FOLDER
        trainer.save_weights(folder)
        trainer.accelerator.wait_for_everyone()
        named: list[Any] = [None]
        if trainer.accelerator.is_main_process:
            run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
            # A step alone does not: at the end of training the best checkpoint may be loaded (load_best_model_at_end).
            content = hashlib.sha256((folder / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest()[:8]
            named = [f"{Path(trainer.args.output_dir).name}-{run}-step-{trainer.state.global_step}-{content}"]
            if self.pushed != named[0]:
                self.sampler.set_adapter(named[0], folder)
        broadcast_object_list(named)
        self.sampler.adapter = self.pushed = named[0]
