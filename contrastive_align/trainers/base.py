"""What all trainers promise, once: arguments, start and reference, layout, precision, saving, resuming, the card."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
import shutil
import signal
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend, gather_object, is_peft_model, tqdm
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftModel, PeftType
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from contrastive_align import demo
from contrastive_align.data.atomic import atomic_write, give_usual_mode, why_not_written
from contrastive_align.data.folder_lock import folder_held
from contrastive_align.data.published import published_copy
from contrastive_align.models.cpu.four_bit import use_training_kernel
from contrastive_align.models.cpu.freed_memory import freed_memory_kept
from contrastive_align.models.describe import describe_adapter, four_bit_options
from contrastive_align.models.last_layer import LastLayer
from contrastive_align.models.layout import set_layout
from contrastive_align.models.loading import (
    MERGED_BASE,
    card_of,
    check_generates,
    check_output_dir,
    check_weights_are_finite,
    context_length,
    load_tokenizer,
    not_finite,
    placement,
    resolve_start,
    undo_rounding,
    unmerged,
    verify_saved,
    with_pad_token,
)
from contrastive_align.models.noise import MOST_ROWS, ROUNDING, gap_per_token, measure_noise, other_batches
from contrastive_align.ranges import check_numbers
from contrastive_align.report.card import (
    DEMO_MODEL,
    Card,
    complete_card,
    licence_of,
    objective_section,
    results_section,
)
from contrastive_align.trainers.configs import ARGUMENTS_NOT_SUPPORTED
from contrastive_align.trainers.engines import HoldsWeights
from contrastive_align.trainers.first_step import cause_of
from contrastive_align.trainers.processes import EndsWorkers, StopOnSignal, on_main
from contrastive_align.trainers.reference import (
    REFERENCE_FILE,
    check_reference_at_start,
    check_reference_of_checkpoint,
)
from contrastive_align.trainers.trials import try_attention, try_options
from contrastive_align.trl_seam import (
    ListensToSignals,
    LoadsTiedWeights,
    Members,
    ReadsColumns,
    SavesModels,
    SavesState,
    create_model_from_path,
    get_config_model_id,
    uploading_copies,
)


logger = logging.get_logger(__name__)

FUNCTIONS_FILE = "functions.json"  # of a checkpoint: what decides its objective

AnyDataset = Dataset | IterableDataset
EvalDataset = AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset]


class AlignmentTrainer(
    HoldsWeights, ListensToSignals, SavesModels, SavesState, LoadsTiedWeights, ReadsColumns, Members
):
    """What stands before the TRL class in the bases of every trainer of this package.

    A trainer calls :meth:`own_args`, :meth:`refuse_arguments` and :meth:`load_start` before TRL's ``__init__``, and
    :meth:`place_reference` and :meth:`choose_layout` after it; at its first batch it calls :meth:`prove_reference`.
    Methods marked "to be overridden" are the trainer's own.

    Attributes:
        start_description: one line on what training starts from, which is also the reference.
        layout: ``"shared"`` or ``"padded"``.
    """

    # All return a loss that Trainer divides by the micro-batches of a step, as TRL's do: an override keeps its scale.
    loss_is_scaled_for_ga = False
    current_gradient_accumulation_steps = 1  # in a loop of one's own, which Trainer.train has not told

    config: type[TrainingArguments]
    suffix: str  # of the default output_dir
    loads_model = True  # here, before TRL wraps it; otherwise TRL loads it by its name
    takes_encoder_decoders = False
    changed_weights = "save the changed model and start from its folder"  # a way out
    start_description = ""
    start_base: str | None = None  # the model under an adapter that training begins from
    start_adapter: str | None = None
    data_names: Sequence[str] = ()  # hub ids, or files, for the model card
    layout = ""
    is_compiled = False
    reference_is_given = False
    reference_is_proven: bool | None = None  # False: at the next batch of train()
    resumed_from: Path | None = None
    stopping: StopOnSignal | None = None  # a command's, which listens for the whole run
    start_step = 0  # of the present train()
    first_step_is_finite = False
    _lost: Tensor | None = None  # whether a loss since the last log was NaN or infinite
    _bad_batch: tuple[Any, Tensor] | None = None  # of the first step, with its loss

    # ---------------------------------------------------------------------------------------------------- arguments

    @classmethod
    def own_args(cls, args: Any, model: str | PreTrainedModel) -> Any:
        """Return a copy of the options, or the defaults: what is changed in the caller's afterwards has no effect.

        Raises:
            TypeError: options of another class.
            ValueError: an option out of its range, or one that cannot be used here.
        """
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            return cls.config(f"{name.split('/')[-1]}-{cls.suffix}")
        if not isinstance(args, cls.config):
            parent = cls.config.__mro__[1].__name__
            raise TypeError(
                f"args is a {type(args).__name__}, expected a {cls.config.__name__}: it takes the options of {parent}."
            )
        args = copy.copy(args)
        for name, value in vars(args).items():
            if isinstance(value, dict) or name == "accelerator_config":
                setattr(args, name, copy.copy(value))
        check_numbers(args)
        try_options(args)
        if not PartialState().is_main_process and args.log_level_replica == "warning":  # its default
            logging.get_logger("contrastive_align").setLevel(logging.ERROR)  # what is said is the same on all processes
        return args

    @classmethod
    def refuse_arguments(
        cls,
        model: str | PreTrainedModel,
        processing_class: Any,
        peft_config: Any = None,
        train_dataset: Any = None,
        **given: Any,
    ) -> None:
        """Refuse arguments of the TRL class that have no meaning here, and training data without a row.

        Raises:
            ValueError: naming the argument and the way out.
        """
        if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise ValueError("train_dataset has no rows, expected at least one. Was all of it filtered out?")
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is not supported by {cls.__name__}: {ARGUMENTS_NOT_SUPPORTED[name]}.")
        if isinstance(processing_class, ProcessorMixin):
            raise ValueError(
                "processing_class is a vision processor, expected a tokenizer: prompts are text here. For images use "
                "TRL's own trainer."
            )
        adapters = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
        for adapter in [*adapters, *([] if peft_config is None else [peft_config])]:
            check_numbers(adapter)
            if adapter.is_prompt_learning:
                raise ValueError(
                    f"{type(adapter).__name__} puts virtual tokens before the prompt, so that the policy never starts "
                    "as the reference. Use LoRA or another adapter of the weights."
                )

    # ------------------------------------------------------------------------------------------ start and reference

    def load_start(
        self,
        model: Any,
        args: Any,
        processing_class: PreTrainedTokenizerBase | None,
        quantization_config: BitsAndBytesConfig | None,
        peft_config: Any,
    ) -> dict[str, Any]:
        """Resolve a model id, which may be that of an adapter, to the start of the run, and load its tokenizer.

        Returns:
            Arguments for TRL's ``__init__``: ``model`` (or its name), ``processing_class``, and what is left of
            ``quantization_config`` and of ``peft_config``, the adapter to be added.

        Raises:
            ValueError: an encoder-decoder that the trainer does not take, or an ``output_dir`` that holds weights of
                the other kind.
        """
        if quantization_config is not None:
            check_numbers(quantization_config)
        start_id = model
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        self.start_description = name or type(model).__name__
        source, kwargs = name, dict(args.model_init_kwargs or {})
        if isinstance(model, str):
            start = resolve_start(
                model,
                output_dir=args.output_dir,
                model_init_kwargs=args.model_init_kwargs,
                quantization_config=quantization_config,
                trust_remote_code=args.trust_remote_code,
                allow_pickled_adapter=args.allow_pickled_adapter,
            )
            if start.model != model:
                logger.warning(f"Start and reference: {start.description}")
                kwargs.pop("revision", None)  # the adapter's
            model, source, self.start_description = start.model, start.tokenizer_source, start.description
            self.start_base, self.start_adapter = start.base, start.adapter
            args.model_init_kwargs = dict(kwargs)
        if isinstance(model, PeftModel) and peft_config is not None and isinstance(start_id, str):
            logger.warning("The adapter's own LoRA goes on training; the peft_config given is not used.")
            peft_config = None
        if processing_class is None:
            processing_class = load_tokenizer(
                source, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
            )
        with_pad_token(processing_class)
        self.check_tokens(processing_class)
        if isinstance(model, str):
            trust = kwargs.setdefault("trust_remote_code", args.trust_remote_code)
            config = AutoConfig.from_pretrained(model, revision=kwargs.get("revision"), trust_remote_code=trust)
            if not config.architectures:
                raise ValueError(
                    f"config.json of {model} has no 'architectures', expected one: [\"LlamaForCausalLM\"]."
                )
        else:
            config = model.config
        check_generates(config, self.start_description, encoder_decoder=self.takes_encoder_decoders)
        is_encoder_decoder = config.is_encoder_decoder
        if isinstance(model, str):
            try_attention(config, kwargs.get("attn_implementation"), trust_remote_code=trust)
        if isinstance(model, str) and self.loads_model:
            # A checkpoint may name a class without the head (BART's does): as a causal model it loses its encoder.
            if is_encoder_decoder:
                kwargs["architecture"] = AutoModelForSeq2SeqLM
            if quantization_config is not None:
                kwargs["quantization_config"] = quantization_config
            self.load_again = functools.partial(create_model_from_path, model, **{**kwargs, **placement()})
            model = self.load_again()
        if not isinstance(model, str) and isinstance(start_id, str):
            quantization_config = None
            if not self.loads_model:
                args.model_init_kwargs = None
        check_output_dir(args.output_dir, adapter=peft_config is not None or isinstance(model, PeftModel))
        found = {"model": model, "processing_class": processing_class}
        return found | {"quantization_config": quantization_config, "peft_config": peft_config}

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError where the trainer cannot use the tokenizer, before a model is loaded (to be overridden)."""

    def check_loaded(self) -> None:
        """Refuse a model that cannot be trained as asked, before it samples or scores anything.

        Raises:
            ValueError: a weight that is NaN or infinite, or an adapter with a whole module that the model lacks.
        """
        names = [name for name, _ in self.model.named_modules()]
        for adapter in self.model.peft_config.values() if is_peft_model(self.model) else ():
            for module in adapter.modules_to_save or ():
                if not any(name.endswith(module) for name in names):
                    raise ValueError(
                        f"modules_to_save names {module!r}, and {self.start_description} has no such module."
                    )
            targets = getattr(adapter, "target_modules", None) or ()
            for module in () if isinstance(targets, str) else sorted(targets):
                if not any(f".{name}".endswith(f".{module}") for name in names):
                    logger.warning(f"target_modules names {module!r}: {self.start_description} has no such module.")
        self.check_finite()

    def check_finite(self) -> None:
        """Raise ValueError where a weight, also a frozen one or one of the reference, is NaN or infinite."""
        for model in self.base_models():
            everywhere = self.from_all_processes if self.is_sharded else list
            check_weights_are_finite(model, self.start_description, everywhere)

    def reference_group(self) -> dict[str, Any] | None:
        """Return the group whose reference log-probs a checkpoint keeps, or None (to be overridden)."""
        raise NotImplementedError

    def reference_logps_of(self, group: dict[str, Any]) -> list[float] | None:
        """Return the reference's log-probs (K) of a group; None where it is not at hand (to be overridden)."""
        raise NotImplementedError

    def batch_of(self, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return a group as a batch on the accelerator (to be overridden)."""
        raise NotImplementedError

    def policy_logps_of(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the policy's log-probs (N,) as the reference's are computed, and their tokens (to be overridden)."""
        raise NotImplementedError

    def other_batches(self, batch: dict[str, Tensor], rows: int) -> list[list[dict[str, Tensor]]]:
        """Return the completions of a batch in other batches, of the first ``rows`` one by one."""
        return other_batches(batch, rows, self.free_columns(batch))

    def free_columns(self, batch: dict[str, Tensor]) -> int:
        """Return how many columns of padding a batch may be given within the model's context."""
        context = context_length(self.model) or 2**31
        return context - max(batch[name].size(1) for name in ("input_ids", "labels") if name in batch)

    def prove_reference(
        self, policy: Tensor, reference: Tensor, lengths: Tensor, batch: dict[str, Tensor], *, same_batch: bool = True
    ) -> None:
        """Check at the first batch that the policy starts as the reference, or that a resumed reference is the same.

        What rounding may make of them is measured on this model, see :meth:`rounding_on`.

        Args:
            policy, reference: log-probs (N,) in nats of the same completions.
            lengths: their tokens.
            batch: of these completions.
            same_batch: whether the reference's were computed in it; cached ones were not.

        Log-probs that are NaN or infinite are left to the check of the first step, which finds out why.

        Raises:
            ReferenceMismatch: it does not, or it is another one.
        """
        if not torch.isfinite(policy - reference).all():
            return
        self.reference_is_proven = True
        start = self.start_description
        if self.resumed_from is not None:
            check_reference_of_checkpoint(
                self.resumed_from,
                self.reference_logps_of,
                lambda gap, group: self.rounding_on(self.batch_of(group), gap),
                start=start,
            )
        elif not (self.state.global_step or self.reference_is_given) and self.args.disable_dropout:
            gap = gap_per_token(policy, reference, lengths).item()
            same_sums = same_batch and self.starts_with_the_same_sums
            noise = self.rounding_on(batch, gap, (policy, lengths), same_sums=same_sums)
            check_reference_at_start(gap, noise, start=start, way_out=self.changed_weights)

    @property
    def starts_with_the_same_sums(self) -> bool:
        """Whether policy and reference begin with the same operations, beside an adapter that adds zeros."""
        adapters = self.model.peft_config.values() if is_peft_model(self.model) else ()
        add_zeros = all(a.peft_type == PeftType.LORA and not getattr(a, "use_dora", False) for a in adapters)
        changed = self.uses_engine or self.is_compiled or self.accelerator.mixed_precision == "fp8"
        return add_zeros and not changed

    def rounding_on(
        self,
        batch: dict[str, Tensor],
        gap: float,
        policy: tuple[Tensor, Tensor] | None = None,
        *,
        same_sums: bool = False,
    ) -> float:
        """Return how far rounding moves a batch's log-probs, in nats per token.

        Measured on the policy, in the precision that runs: the batch is computed again, and in other batches. A gap
        within the rounding of float32 needs no measurement.

        Args:
            gap: what is to be judged.
            policy: its log-probs and their tokens, where they were computed already.
            same_sums: whether the same operations were made, so that only repeating them is to be allowed for.
        """
        if self.is_sharded:  # all processes measure, or none
            gap = max(gather_object([gap]))
        if gap <= ROUNDING:
            return ROUNDING
        rows = min(gather_object([len(batch["valid"])])) if self.is_sharded else MOST_ROWS
        ways = [[batch]] if same_sums else [[batch], *self.other_batches(batch, min(rows, MOST_ROWS))]
        logps, lengths = policy or self.policy_logps_of(batch)
        return max(ROUNDING, measure_noise(logps, lengths, self.policy_logps_of, ways))

    # ---------------------------------------------------------------------- engines, precision, layout, compilation

    @property
    def computes_in_16_bits(self) -> bool:
        """Whether the accelerator computes in 16 bits or less, as arguments, launcher or DeepSpeed ask for."""
        return self.accelerator.mixed_precision != "no"

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that the accelerator computes in, where it is not that of the weights."""
        return {"no": None, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.bfloat16)

    def choose_layout(self, obstacle: str | None = None) -> None:
        """Decide how batches go through the models, and compile their layers where that is asked for.

        Args:
            obstacle: why the shared layout cannot be tried, if it cannot.

        Raises:
            ValueError: a layout, a parallelism or a compilation that the model or the engine does not allow.
        """
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism cut completions apart, and their log-probs are not summed again. Use "
                "data, tensor or FSDP parallelism."
            )
        self.check_engine()
        self.check_loaded()
        undo_rounding(self.model)
        models = self.base_models()
        for model in models:
            use_training_kernel(model)
        self.layout = set_layout(
            models, self.args.layout, obstacle=obstacle, sharded=self.is_sharded, autocast=self.autocast_dtype
        )
        self.is_compiled = compile_layers(self, models)

    def context_limits(self) -> dict[str, int]:
        """Return the most tokens that prompt and completion may have together, by the name of each limit."""
        args = self.args
        limits = {"the model's context": context_length(self.model), "max_length": getattr(args, "max_length", None)}
        if getattr(args, "use_vllm", False) and args.vllm_mode == "colocate":
            limits["vllm_max_model_length"] = args.vllm_max_model_length
        return {name: limit for name, limit in limits.items() if limit}

    def leave_room_for_prompts(self) -> None:
        """Halve the tokens that a completion may have where they are all that the model's context has, and say so."""
        name, limit = min(self.context_limits().items(), key=lambda item: item[1], default=("", 2**31))
        asked = self.args.max_completion_length
        if asked >= limit:
            self.args.max_completion_length = limit // 2
            logger.warning(
                f"max_completion_length={asked} leaves no token of {name} ({limit}) to a prompt: completions have at "
                f"most {limit // 2} tokens here. Set max_completion_length to choose the share yourself."
            )

    def progress(self, items: Iterable, description: str) -> Iterable:
        """Show a progress bar on the main process, unless ``disable_tqdm``."""
        return items if self.args.disable_tqdm else tqdm(items, desc=description)

    # ------------------------------------------------------------------------------------------ training, resuming

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as in TRL, while no other run may write into the same folders.

        Under ``enable_jit_checkpoint``, SIGTERM ends training after the step, with a checkpoint, on all processes at
        the same step; Trainer's own handler, in whose place this is, waits three seconds on each process by itself.

        Args:
            resume_from_checkpoint: a checkpoint, or ``True`` for the newest whole one of ``output_dir``; with none
                there, training begins anew and says so.

        Raises:
            ValueError: a checkpoint that is not whole, with the newest that is.
            FolderInUse: another run writes into the folder.
        """
        with contextlib.ExitStack() as around:
            hold_folders(around, self.written_folders)
            stopping = self.stopping
            if stopping is None and self.args.enable_jit_checkpoint:
                stopping = StopOnSignal()
                around.enter_context(stopping.listening([signal.SIGTERM]))
            if stopping is not None:
                around.enter_context(stopping.training())
            for callback in filter(None, (stopping, EndsWorkers())):
                self.add_callback(callback)
                around.callback(self.remove_callback, callback)
            around.enter_context(self.keeping_freed_memory())
            around.enter_context(uploading_copies(published_copy))
            result = super().train(self._begin(resume_from_checkpoint), *args, **kwargs)
            self._check_that_it_trained()
            return result

    def _begin(self, resume_from_checkpoint: str | os.PathLike | bool | None) -> str | None:
        """Return the checkpoint to resume from, with this trainer's own state of it loaded."""
        needed = self.state_files
        checkpoint = on_main(checkpoint_to_resume, resume_from_checkpoint, self.args.output_dir, needed)
        self.resumed_from = None if checkpoint is None else Path(checkpoint)
        if self.resumed_from is not None or self.reference_is_proven is None:
            self.reference_is_proven = False
        self.start_step, self.first_step_is_finite, self._bad_batch, self._lost = 0, False, None, None
        if self.resumed_from is not None:
            state = (self.resumed_from / TRAINER_STATE_NAME).read_text(encoding="utf-8")
            self.start_step = json.loads(state)["global_step"]
            self.load_state(self.resumed_from)
            check_functions(self.resumed_from, self.functions())
        self.check_finite()  # again: weights may have been changed since
        self.begin_training(going_on=bool(resume_from_checkpoint))
        return checkpoint

    @property
    def written_folders(self) -> Sequence[str | Path]:
        """Folders that no other run may write into while this one trains."""
        return (self.args.output_dir,)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule as Trainer does; warn where there is no warm-up or it does not end."""
        warm, kind = self.args.get_warmup_steps(num_training_steps), self.args.lr_scheduler_type
        said = f"warmup_steps={self.args.warmup_steps:g}"
        if warm and kind == "constant":
            logger.warning(
                f"{said} is not used: lr_scheduler_type='constant' has no warm-up, 'constant_with_warmup' has."
            )
        elif warm >= num_training_steps and kind not in ("reduce_lr_on_plateau", "greedy"):
            logger.warning(
                f"{said} is {warm} of the {num_training_steps} steps: the learning rate never reaches "
                f"{self.args.learning_rate:g}."
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _check_that_it_trained(self) -> None:
        step, last = self.state.global_step, self.state.max_steps
        if step > self.start_step:
            return
        if self.resumed_from is None or step < last:
            raise ValueError(
                f"No step was made (of {last}): the training data fill no batch, or a callback stopped training. Give "
                "more rows, lower per_device_train_batch_size, or leave dataloader_drop_last out."
            )
        logger.warning(f"{self.resumed_from} is the end of its run: step {step} of {last}. Nothing was trained.")

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Make a step as TRL does; stop where the first one is not finite.

        Later losses are looked at where the device is waited for anyway: see :meth:`log` and :meth:`check_weights`.

        Raises:
            ValueError: the loss or the gradient of the first step is not finite, with the likely cause (under DeepSpeed
                and with a gradient scaler only the loss is looked at).
        """
        with self.keeping_freed_memory(hand_back=False):  # also in a loop of one's own
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.first_step_is_finite:
            self._check_first_step(inputs, loss)
        else:
            lost = torch.isfinite(loss).logical_not()
            self._lost = lost if self._lost is None else lost | self._lost
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does; stop where training diverged since the last log, at which Trainer reads the loss anyway.

        Raises:
            ValueError: a trained weight that is NaN or infinite.
        """
        super().log(logs, start_time)
        if self._lost is None or not ("loss" in logs or "train_runtime" in logs):  # made on every process
            return
        lost, self._lost = self.accelerator.gather(self._lost.reshape(1)).any(), None
        if lost:
            self.check_weights()

    def _check_first_step(self, inputs: Any, loss: Tensor) -> None:
        """Look at the loss of every micro-batch and at the gradient of their sum, on all processes."""
        if self._bad_batch is None and not torch.isfinite(loss):
            self._bad_batch = (self.prepared_batch(inputs), loss)
        if not self.accelerator.sync_gradients:
            return
        gradients = []
        if self.accelerator.scaler is None:  # which begins with a scale that may be too large
            gradients = not_finite((name, p.grad) for name, p in self.model.named_parameters())
        bad = self.from_all_processes(gradients if self._bad_batch is None else ["loss"])
        if not bad:
            self.first_step_is_finite = True
            return
        batch, loss = self._bad_batch or (self.prepared_batch(inputs), loss)
        bad = ["loss"] if "loss" in bad else bad
        what = "loss" if bad == ["loss"] else "gradient"
        raise ValueError(f"The {what} of the first step is NaN or infinite. {cause_of(self, batch, bad, loss)}")

    def from_all_processes(self, names: list[str]) -> list[str]:
        """Return the names that any process gives, so that all decide alike."""
        return sorted({name for part in gather_object([names]) for name in part})

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run Trainer's evaluation; on a CPU, freed memory is kept for it."""
        with self.keeping_freed_memory():
            return super().evaluation_loop(*args, **kwargs)

    def keeping_freed_memory(self, **options: Any) -> contextlib.AbstractContextManager:
        """Keep freed memory inside the block, on a CPU; not what an engine gathers, a copy of the weights each time."""
        return freed_memory_kept("" if self.uses_engine else self.args.device.type, **options)

    def begin_training(self, *, going_on: bool) -> None:
        """Prepare the first step (to be overridden). ``going_on``: the caller asked to resume."""

    def functions(self) -> dict[str, dict[str, str | None]]:
        """Return option -> the names of the functions that decide the objective -> a hash of the source (user's only).

        A checkpoint stores it, and a run is not resumed with others (to be overridden).
        """
        return {}

    @property
    def state_files(self) -> Sequence[str]:
        """Files without which a checkpoint of this trainer is not whole."""
        return ()

    def load_state(self, checkpoint: Path) -> None:
        """Read what :meth:`save_own_state` has written (to be overridden).

        Raises:
            ValueError: the checkpoint was written by another trainer, or under options that must not change.
        """

    def save_own_state(self, folder: Path) -> None:
        """Write what a resumed run needs beside Trainer's state, on every process (to be overridden)."""

    @contextlib.contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """Say what to do where the disk does not take a checkpoint, or the model.

        Raises:
            OSError: with path, cause, free space and the newest checkpoint that is whole; a checkpoint of which a part
                was written is removed, so that it takes no room.
        """
        try:
            yield
        except Exception as error:
            if (cause := why_not_written(error, folder)) is None:
                raise
            output_dir = Path(self.args.output_dir)
            if folder != output_dir and self.args.should_save and problem_with_checkpoint(folder):
                shutil.rmtree(folder, ignore_errors=True)
            newest = newest_whole_checkpoint(output_dir, self.state_files)
            goes_on = (
                f"go on from {newest} with resume_from_checkpoint=True" if newest else "begin anew: nothing is saved"
            )
            raise OSError(
                cause.errno,
                f"{folder} was not written: {cause.strerror}. Make room, then {goes_on}.",
            ) from error

    @contextlib.contextmanager
    def writing_checkpoint(self, folder: Path) -> Iterator[None]:
        """Write a checkpoint, in the place of one that a run left when it was killed."""
        if self.args.should_save and folder.is_dir() and problem_with_checkpoint(folder, self.state_files):
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        with self.writing(folder):
            yield

    def save_state(self, folder: Path) -> None:
        """Write a checkpoint's own state and the note on its reference, before Trainer writes what says it is whole."""
        group = self.reference_group()
        logps = None if group is None else self.reference_logps_of(group)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of a checkpoint that is written again
            with atomic_write(folder / FUNCTIONS_FILE) as file:
                file.write(json.dumps(self.functions()).encode())
            if group is not None:
                note = {"reference": self.start_description, "group": group, "logps": logps}
                with atomic_write(folder / REFERENCE_FILE) as file:
                    file.write(json.dumps(note).encode())
        self.save_own_state(folder)

    # ---------------------------------------------------------------------------------------------------- saving

    def check_weights(self) -> None:
        """Refuse to save a model that diverged.

        Raises:
            ValueError: a trained weight that is NaN or infinite, on any process.
        """
        bad = not_finite((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        if self.uses_engine or self.get_tp_size() > 1:  # else every process has all, and one alone may save
            bad = self.from_all_processes(bad)
        if bad:
            raise ValueError(
                f"'{bad[0]}' has NaN or infinite entries: training diverged, and nothing is saved. Lower learning_rate "
                f"(it is {self.args.learning_rate:g})."
            )

    def finish_saving(self, folder: Path) -> None:
        """Read back what was saved, before it may be pushed."""
        if self.args.should_save:
            verify_saved(folder, may_be_sharded=self.uses_engine)
            give_usual_mode(folder.glob("*.safetensors"))

    def objective(self) -> dict[str, Any]:
        """Return what decides the objective, by name, for the model card (to be overridden)."""
        raise NotImplementedError

    @property
    def is_conversational(self) -> bool:
        """Whether the prompts are messages."""
        row = next(iter(self.train_dataset), {}) if self.train_dataset is not None else {}
        return not isinstance(row.get("prompt", ""), str)

    def asked_with(self) -> tuple[str, str, bool] | None:
        """Return a condition's kind, its best text, and whether it has tokens of its own (to be overridden)."""
        return None

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card: what TRL's template says of the procedure, and the rest from the run and ``summary.json``.

        It is the same whoever asks for it: a command, a checkpoint or a push.
        """
        if dataset_name is not None:
            self.data_names = (dataset_name,)
        super().create_model_card(model_name, None, tags)
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            sections, summary = [objective_section(self.objective())], folder / "summary.json"
            found = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
            if found.get("table"):
                sections.append(results_section(found))
            complete_card(folder / "README.md", self._card(model_name), sections, found)

    def _card(self, title: str | None) -> Card:
        args, model, tokenizer = self.args, self.model, self.processing_class
        base_model = model.get_base_model() if is_peft_model(model) else model
        known = self.start_base or get_config_model_id(base_model.config)
        base = unmerged(known) if known else f"a {type(base_model).__name__} given in memory"
        name, licence = name_and_licence(base)
        adapter = describe_adapter(model)
        condition = self.asked_with()
        named_inputs = getattr(tokenizer, "model_input_names", ())
        merged = adapter and Path(args.output_dir, MERGED_BASE).is_dir()
        return Card(
            title=title or (args.hub_model_id or Path(args.output_dir).name).split("/")[-1],
            folder=self.hub_model_id or ".",
            base=name,
            base_licence=licence,
            data=self.data_names,
            adapter=adapter["type"] if adapter else None,
            start_adapter=self.start_adapter,
            continued=self.start_adapter is not None and not merged,
            merged_base=MERGED_BASE if merged else None,
            quantisation=four_bit_options(base_model) if adapter else None,
            condition=condition[:2] if condition else None,
            condition_tokens=bool(condition and condition[2]),
            encoder_decoder=model.config.is_encoder_decoder,
            chat=self.is_conversational,
            tokenizer_options=", return_token_type_ids=False" if "token_type_ids" in named_inputs else "",
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push as Trainer does; what goes up names no path of this machine (see ``data.published``)."""
        with uploading_copies(published_copy):
            return super().push_to_hub(*args, **kwargs)

    def end(self) -> None:
        """End the run as Trainer does, once all processes have arrived: none leaves while another still talks to it."""
        self.accelerator.wait_for_everyone()
        super().end()

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        """Refused: there are no logits to return."""
        raise NotImplementedError(
            f"predict returns logits, which {type(self).__name__} never builds. trainer.evaluate(dataset) gives the "
            "metrics."
        )


def name_and_licence(base: str) -> tuple[str, dict[str, str]]:
    """Return what a card calls a base, and the licence entries of the base's own card."""
    if base == demo.MODEL_PATH:
        return DEMO_MODEL, {"license": demo.LICENCE}
    return base, licence_of(card_of(base))


def disable_functional_dropout(model: nn.Module) -> None:
    """Set to 0 the dropout and layer-drop rates that modules keep as numbers, which ``nn.Dropout`` modules do not."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def keep_adapter_as_reference(model: PeftModel) -> None:
    """Keep a frozen copy of the adapter that a model came with, as in TRL: the reference is the start, not its base.

    Raises:
        ValueError: the adapter trains whole modules or rows of tokens.
    """
    config = model.peft_config[model.active_adapter]
    if config.modules_to_save or getattr(config, "trainable_token_indices", None):
        raise ValueError(
            "The model's adapter trains whole modules or rows of tokens (modules_to_save, trainable_token_indices), of "
            "which no frozen copy can stand beside it. Merge it first, or set kl_coef=0, which needs no reference."
        )
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data.copy_(model.get_parameter(name.replace(".ref.", f".{model.active_adapter}.")).data)


# ------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_to_resume(
    resume: str | os.PathLike | bool | None, output_dir: str | os.PathLike, needed: Sequence[str] = ()
) -> str | None:
    """Return the checkpoint that ``resume_from_checkpoint`` means, or None to begin anew.

    Args:
        resume: as in :meth:`AlignmentTrainer.train`.
        needed: files of the trainer's own state.

    Raises:
        ValueError: a checkpoint that is not whole.
    """
    if not resume:
        return None
    if resume is not True:
        if (problem := problem_with_checkpoint(Path(resume), needed)) is None:
            return os.fspath(resume)
        newest = newest_whole_checkpoint(output_dir, needed)
        way_out = f"The newest whole one is {newest}." if newest else f"{os.fspath(output_dir)} has no whole one."
        raise ValueError(f"resume_from_checkpoint={os.fspath(resume)!r} cannot be resumed: {problem}. {way_out}")
    found = newest_whole_checkpoint(output_dir, needed)
    if found is None:
        logger.warning(f"{os.fspath(output_dir)} holds no checkpoint that is whole: training begins anew.")
    return None if found is None else os.fspath(found)


def newest_whole_checkpoint(output_dir: str | os.PathLike, needed: Sequence[str] = ()) -> Path | None:
    """Return the newest checkpoint that was written to its end, or None; newer ones are named in a warning."""
    places = Path(output_dir).glob("checkpoint-*")
    found = [(int(match[1]), place) for place in places if (match := re.fullmatch(r"checkpoint-(\d+)", place.name))]
    for _, folder in sorted(found, reverse=True):
        problem = problem_with_checkpoint(folder, needed)
        if problem is None:
            return folder
        logger.warning(f"{folder} was not written to its end and is skipped: {problem}.")
    return None


def problem_with_checkpoint(folder: Path, needed: Sequence[str] = ()) -> str | None:
    """Why a checkpoint is not whole, or None. Trainer writes ``trainer_state.json`` after everything else."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    for name in [*needed, TRAINER_STATE_NAME]:
        if not (folder / name).is_file():
            return f"it has no {name}"
    for file in sorted(folder.rglob("*")):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    tensors.keys()
            elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
                return f"{file.name} is cut off"
        except (OSError, ValueError, SafetensorError) as error:
            return f"{file.name} cannot be read ({str(error).splitlines()[0]})"
    return None


def check_functions(checkpoint: Path, now: dict[str, dict[str, str | None]]) -> None:
    """Refuse to resume with another loss, divergence, condition or feature; older checkpoints say nothing of them.

    Raises:
        ValueError: naming what differs.
    """
    file = checkpoint / FUNCTIONS_FILE
    for option, then in json.loads(file.read_text(encoding="utf-8")).items() if file.is_file() else ():
        found = now.get(option, {})
        changed = [name for name in found if name in then and then[name] != found[name]]
        what = f"this run has {', '.join(found)}"
        if changed:
            what = f"the source of {', '.join(changed)} has changed since"
        if found != then:
            raise ValueError(
                f"{checkpoint} was trained with {option} {', '.join(then)}, and {what}. Resume with the same, or start "
                f"anew from its weights: model='{checkpoint}'."
            )


def save_tensors(value: Any, path: Path) -> None:
    """Write tensors, in plain containers, aside and rename the file once it is whole."""
    with atomic_write(path) as file:
        torch.save(value, file)


def hold_folders(until: contextlib.ExitStack, folders: Iterable[str | os.PathLike]) -> None:
    """Hold folders against other runs until the stack is closed.

    Raises:
        FolderInUse: another run writes into one of them.
        OSError: one takes no files.
    """
    for folder in folders:
        if taken_over := on_main(until.enter_context, folder_held(folder)):
            logger.warning(taken_over)


# -------------------------------------------------------------------------------------------------------- compilation


def compile_layers(trainer: Trainer, models: Sequence[PreTrainedModel]) -> bool:
    """Compile the parts of the models' layers where the arguments, or ``accelerate launch``, ask for ``torch_compile``.

    Returns whether they do.

    Accelerate would compile the model as a whole. The loss in its head and the attention over packed rows differ with
    the lengths of every batch; the layers' attention, MLP and norms do not, and one compilation serves all lengths.

    Raises:
        ValueError: under DeepSpeed or FSDP, or no layer that can be compiled.
    """
    plugin = trainer.accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return False
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("torch_compile is not supported under DeepSpeed or FSDP. Leave it out, or train with DDP.")
    options = {**plugin.to_kwargs(), "dynamic": True}
    plugin.backend = DynamoBackend.NO  # for the whole model, which the accelerator has not met yet
    for model in models:
        parts = parts_of_layers(model)
        if not parts:
            raise ValueError(
                f"torch_compile: {type(model).__name__} has no layers of transformers' GradientCheckpointingLayer, "
                "whose parts are what is compiled. Leave it out."
            )
        if isinstance(last_layer := getattr(model, "last_layer", None), LastLayer):
            last_layer.spare_attention()
        for part in parts:
            part.compile(**options)  # in place: its class and the names of its weights stay
    return True


def parts_of_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that the blocks of a transformer call: attention, MLP and norms; no embeddings, no head."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [part for layer in layers for part in _called_modules(layer)]


def _called_modules(module: nn.Module) -> list[nn.Module]:
    """Return the child modules, with a list of modules (T5 has some) replaced by its elements."""
    parts: list[nn.Module] = []
    for child in module.children():
        parts += _called_modules(child) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
    return parts
