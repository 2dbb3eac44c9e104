"""The one run that all training commands share, and the parts of it that need no method."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy
from trl import get_peft_config, get_quantization_config

from contrastive_align import demo
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.launch import preflight
from contrastive_align.launch.arguments import Arguments, RunArguments, parse
from contrastive_align.launch.console import LiveLine
from contrastive_align.launch.datasets import load_prompts
from contrastive_align.launch.quiet import quiet_run
from contrastive_align.launch.record import AFTER, BEFORE, HeldOut, Recorder, choose_rows, shown_text
from contrastive_align.launch.usage import UsageError
from contrastive_align.models.cpu.freed_memory import keep_freed_memory
from contrastive_align.models.describe import count_parameters, describe_adapter, four_bit_options, quantisation_of
from contrastive_align.models.loading import ADAPTER_CONFIG, not_finite
from contrastive_align.report import Summary, card
from contrastive_align.report.doctor import as_dicts, diagnose
from contrastive_align.report.page import PAGE
from contrastive_align.report.summary import wrap, wrapped_table
from contrastive_align.trainers import ContrastiveConfig
from contrastive_align.trainers.base import hold_folders, newest_whole_checkpoint
from contrastive_align.trainers.processes import StopOnSignal, Stopped, keep_to_the_end
from contrastive_align.trl_seam import ignore_bool_buffers
from contrastive_align.versions import SUPPORTED


CHECKED = 4  # prompts that the start is checked on where the page shows none


class Run:
    """One run of a training command, from its parsed arguments to ``summary.json``.

    :meth:`execute` holds the order and everything that the commands do alike. A command gives the parts that depend on
    its method by overriding the others. These read ``train_rows``, ``test_rows`` and ``data_name``, later ``trainer``
    and ``summary``; until the trainer is built, they may append to ``args.notes``.
    """

    command: str
    arguments_class: type[RunArguments] = RunArguments
    config_class: type = ContrastiveConfig
    # Options of the bundled model and of the bundled data that no flag or YAML file sets.
    demo_model: ClassVar[dict[str, Any]] = {}
    demo_data: ClassVar[dict[str, Any]] = {}
    summary_class: type[Summary] = Summary
    rows_are = "prompts"

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> Arguments:
        """Parse a command line, and again with defaults: those of the bundled model and data where these are used.

        What :meth:`defaults` returns of the first result overrides both.
        """
        options: dict[str, Any] = {
            "prog": f"contrastive-align {cls.command}",
            "script": cls.arguments_class,
            "training": cls.config_class,
        }
        args = parse(argv, **options)
        check_model_flags(args)
        chosen = cls.defaults(args)
        defaults = DEMO_MODEL | cls.demo_model if args.model.model_name_or_path is None else {}
        defaults |= DEMO_DATA | cls.demo_data if args.bundled_data else {}
        found = parse(argv, defaults=defaults | chosen, **options)
        found.command_line = command_line(cls.command, sys.argv[1:] if argv is None else argv)
        return found

    @classmethod
    def defaults(cls, args: Arguments) -> dict[str, Any]:
        """Return what the command line leaves out; refuse flags that do not fit together."""
        return {"output_dir": f"runs/{cls.command}"}

    def __init__(self, args: Arguments) -> None:
        self.args = args

    def load_data(self) -> tuple[Any, Any, str]:
        """Return the training rows, the evaluation rows or None, and the name of the data."""
        return load_prompts(self.args)

    def build_trainer(self, checkpoint: str | bool | None) -> Any:
        """Build the trainer. ``checkpoint`` is what the run will be resumed from."""
        raise NotImplementedError

    def describe(self) -> tuple[str, dict[str, Any]]:
        """Describe the method: its line in the table, and its options."""
        raise NotImplementedError

    def describe_data(self) -> dict[str, dict[str, Any]]:
        """Describe each split, with its ``line`` and ``notes`` in the table, and whether its prompts are messages."""
        name, splits = self.data_name, {"train": self.train_rows, "test": self.test_rows}
        return {
            split: {
                "line": f"{name}: {len(rows)} {self.rows_are}",
                "notes": [],
                "name": name,
                "rows": len(rows),
                "conversational": not isinstance(rows[0]["prompt"], str),
            }
            for split, rows in splits.items()
            if rows is not None
        }

    def describe_reference(self) -> str:
        """Describe the reference in the table."""
        name, model = self.model_name, self.trainer.model
        if not is_peft_model(model):
            return f"{name}, a frozen copy"
        return name + (": a frozen copy of the adapter" if "ref" in model.peft_config else ", with the new adapter off")

    @property
    def model_name(self) -> str:
        """The model's name in the table."""
        name = self.args.model.model_name_or_path
        return "the bundled demo model" if name == demo.MODEL_PATH else self.trainer.start_description

    def leave_nothing(self) -> None:
        """Remove the empty folders that a run makes which does not train (to be overridden)."""

    def before_training(self) -> None:
        """Measure the model at the start."""

    def train(self, checkpoint: str | bool | None) -> None:
        """Train; True resumes from the newest whole checkpoint, and begins anew if there is none."""
        self.trainer.train(resume_from_checkpoint=checkpoint)

    # ------------------------------------------------------------------------------------------------- what is seen

    def held_out(self, most: int) -> HeldOut:
        """Choose prompts to sample before, during and after training: held-out ones where there are any."""
        rows = choose_rows(self.train_rows if self.test_rows is None else self.test_rows, most, self.args.training.seed)
        rows = [row for row in rows if row.get("prompt")]
        prompts = [row["prompt"] for row in rows]
        ids = [tokenise_prompt(prompt, self.trainer.processing_class) for prompt in prompts]
        return HeldOut([shown_text(prompt) for prompt in prompts], ids, rows, self._where)

    @property
    def _where(self) -> str:
        return f"{'training' if self.test_rows is None else 'held-out'} prompts"

    def rewards_of(self) -> tuple[Any, str]:
        """Return the function that scores samples for the page (see ``record.Rewards``), or None, and its name."""
        return None, ""

    def longest_and_mean(self) -> tuple[int, int] | None:
        """Return the tokens of the longest and of the mean batch; None where they are not known."""
        args, known = self.trainer.args, self.recorder.held_out.ids
        new = getattr(args, "max_completion_length", None)
        if not known or not new:
            return None
        lengths = [len(ids) for ids in known]
        rows = args.per_device_train_batch_size
        return rows * (max(lengths) + new), round(rows * (sum(lengths) / len(lengths) + new))

    def planned_steps(self) -> int | None:
        """Return the number of optimiser steps; None for a stream, whose end is not known."""
        args, rows = self.trainer.args, self.trainer.train_dataset
        if args.max_steps > 0:
            return args.max_steps
        if not hasattr(rows, "__len__"):
            return None
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return math.ceil(args.num_train_epochs * math.ceil(len(rows) / per_step))

    def facts(self) -> dict[str, Any]:
        """Return numbers of the data and the options that the doctor reads, and a hash of the data."""
        return {"data_hash": preflight.hash_of_rows(self.train_rows)}

    def _look_before(self) -> None:
        """Sample the start, and check what can be checked before the first step."""
        trainer, summary = self.trainer, self.summary
        most = shown = self.args.script.report_prompts
        if shown and trainer.is_sharded and trainer.model.config.is_encoder_decoder:
            self.args.notes.append("no samples for report.html: the weights of an encoder-decoder model are sharded")
            most = 0
        elif not shown and not trainer.uses_engine:  # under which sampling costs more than a check is worth
            most = CHECKED
        rewards, name = self.rewards_of() if shown else (None, "")
        held_out = self.held_out(most) if most else HeldOut([], [], [], "")
        tokens = getattr(trainer, "condition_ids", ())
        self.recorder = Recorder(trainer, held_out, rewards=rewards, reward_name=name, suppress=tokens)
        if trainer.uses_engine:  # it takes the weights, and brings them to their device, when training begins
            self.recorder.once_prepared = self._look_at_start
        else:
            self.recorder.sample(BEFORE)
        trainer.add_callback(self.recorder)
        summary.facts = self.facts()
        batch = self.longest_and_mean()
        summary.preflight["first step"] = preflight.steps_in_words(trainer, self.planned_steps(), batch)
        if batch is not None and not trainer.is_sharded:
            needed, self._there_is = preflight.memory_in_words(trainer, batch[0])
            summary.preflight["memory"] = needed
        for name, said in (
            ("checks", preflight.checks_in_words(trainer, self.recorder)),
            ("sample", preflight.sample_in_words(self.recorder)),
        ):
            if said:
                summary.preflight[name] = said
        if not shown:
            self.recorder.forget_start()

    def _look_at_start(self) -> None:
        """Sample the start under an engine, and say what could not be said in the table before training."""
        summary, recorder = self.summary, self.recorder
        recorder.sample(BEFORE)
        said = {"start": preflight.start_in_words(recorder), "sample": preflight.sample_in_words(recorder)}
        said = {name: text for name, text in said.items() if text}
        summary.preflight |= said
        recorder.summary = summary.contents()
        if said:
            print_on_main(wrapped_table(list(said.items())))

    _there_is = ""

    def _opening(self) -> str:
        summary = self.summary
        shown = dataclasses.replace(summary, preflight=dict(summary.preflight))
        if "memory" in shown.preflight:  # what there is differs from run to run, and is no part of summary.json
            memory = shown.preflight.pop("memory") + self._there_is
            shown.preflight["first step"] += f"; {memory}"
        return shown.opening()

    def _look_after(self) -> None:
        """Sample the trained model, and ask the doctor."""
        summary, recorder = self.summary, self.recorder
        recorder.sample(AFTER)
        summary.samples = recorder.changes
        diagnosis = diagnose(summary.contents(), recorder.history)
        summary.doctor = as_dicts(diagnosis.findings)
        summary.verdict = diagnosis.lines

    def _look_at_failure(self, error: Exception) -> None:
        """Write the page of a run that an error stopped, with what the doctor says of it."""
        recorder, state, model = self.recorder, self.trainer.state, self.trainer.model
        lost = not_finite((name, p) for name, p in model.named_parameters() if p.requires_grad)
        recorder.summary = self.summary.contents()
        recorder.summary["facts"] |= {"weights_not_finite": len(lost)} if lost else {}
        said = without_secrets((str(error) or type(error).__name__).strip().splitlines()[0])
        recorder.write_page(unfinished=f"{state.global_step} of {state.max_steps}", stopped=said)

    def after_saving(self) -> None:
        """Write further files beside the model, and add to ``summary.training`` and ``summary.saved``."""

    def measure(self) -> None:
        """Measure the trained model and fill in ``summary.metrics``."""

    def kept(self) -> str:
        """Say what a stopped run keeps beside its checkpoints (to be overridden)."""
        return ""

    def execute(self) -> Summary:
        """Make the run, while no other may write into its folder; a signal stops it in order.

        Raises:
            UsageError: what the user can correct.
            Stopped: Ctrl-C or SIGTERM; how to go on was printed.
        """
        self.stopping = StopOnSignal()
        keep_to_the_end(self)
        with contextlib.ExitStack() as around:
            try:
                around.enter_context(self.stopping.listening((signal.SIGINT, signal.SIGTERM)))
                hold_folders(around, [self.args.training.output_dir])
                return self._execute()
            except Stopped as stopped:
                print_on_main(self._how_to_go_on(stopped))
                raise

    def _stop_if_asked(self) -> None:
        if self.stopping.signal is not None:
            self.trainer.end()
            raise Stopped(self.stopping.signal)

    def _how_to_go_on(self, stopped: Stopped) -> str:
        args, trainer = self.args.training, getattr(self, "trainer", None)
        by = "Ctrl-C" if stopped.signal == signal.SIGINT else signal.Signals(stopped.signal).name
        if hasattr(self, "summary") and self.summary.saved:
            return f"Stopped by {by}: the trained model is in {args.output_dir}; it was not measured to the end."
        newest = trainer and newest_whole_checkpoint(args.output_dir, trainer.state_files)
        if newest:
            goes_on = f"{newest} is whole, and the same command with --resume_from_checkpoint=true goes on from there."
        elif args.save_strategy == SaveStrategy.NO:
            goes_on = "No checkpoints are kept (--save_strategy=no): the same command begins anew."
        else:
            goes_on = "There is no checkpoint yet: the same command begins anew."
        return " ".join(filter(None, [f"Stopped by {by}.", self.kept() if trainer else "", goes_on]))

    def _execute(self) -> Summary:
        """Build, describe, train, save, measure, write ``summary.json``; return it.

        The model is saved before it is measured, so that a failing measurement loses nothing.
        """
        args, folder = self.args, self.args.training.output_dir
        on_cpu = args.training.device.type == "cpu"
        quiet_run(on_cpu=on_cpu)
        if on_cpu and args.training.deepspeed_plugin is None:
            keep_freed_memory()
        resume = args.training.resume_from_checkpoint
        checkpoint = {"true": True, "false": None, "none": None}.get(str(resume).lower(), resume)
        set_seed(args.training.seed)
        self.train_rows, self.test_rows, self.data_name = self.load_data()
        unused = sorted({"dataset_test_split", "max_eval_samples"} & args.given)
        if self.test_rows is None and unused:
            raise UsageError(f"--{unused[0]} is given, but there is no evaluation split to take it from.")
        self.trainer = trainer = self.build_trainer(checkpoint)
        trainer.stopping = self.stopping
        trainer.data_names = (card.DEMO_DATA,) if args.bundled_data else args.dataset_names
        if args.script.ignore_bias_buffers:
            ignore_bool_buffers(trainer)
        line, options = self.describe()
        self.summary = summary = self.summary_class(
            method={"line": line, "trainer": type(trainer).__name__, **options},
            model=self._describe_model(),
            reference=self.describe_reference(),
            data=self.describe_data(),
            engine=trainer.describe_engine(),
            versions={package: version(package) for package in [*SUPPORTED, "contrastive_align"]},
            command=args.command_line,
            settings=given_settings(args),
        )
        if (Path(folder) / "summary.json").is_file() and not (checkpoint or args.script.preflight_only):
            args.notes.append(f"{folder} holds an earlier run, which this one replaces")
        self._look_before()
        print_on_main(self._opening())
        for note in args.notes:
            print_on_main("\n".join(wrap(f"note: {note}")))
        if args.script.preflight_only:
            trainer.end()
            self.leave_nothing()
            return summary
        trainer.add_callback(RemoveEarlierSummary())
        LiveLine.install(trainer)

        self.before_training()
        self.recorder.summary = summary.contents()
        started = time.perf_counter()
        try:
            self.train(checkpoint)
        except Exception as error:
            with contextlib.suppress(Exception):  # of a full disk or a lost device: the first error is told
                self._look_at_failure(error)
            raise
        if trainer.state.global_step < trainer.state.max_steps:
            self._stop_if_asked()
        summary.training = {"steps": trainer.state.global_step, "seconds": round(time.perf_counter() - started, 1)}
        self._save_model()
        self.after_saving()
        self._stop_if_asked()
        self.measure()
        self._look_after()
        if trainer.args.should_save:
            summary.write(folder)
        self.recorder.summary = summary.contents()
        self.recorder.write_page()
        trainer.create_model_card()  # with the results
        print_on_main(summary.closing())
        if args.training.push_to_hub:
            trainer.push_to_hub()
        trainer.end()
        return summary

    def options(self, *names: str) -> dict[str, Any]:
        """Return these options of the training config."""
        return {name: getattr(self.args.training, name) for name in names}

    def _describe_model(self) -> dict[str, Any]:
        model, arguments = self.trainer.model, self.args.model
        parameters, trained = count_parameters(model), count_parameters(model, trained=True)
        quantisation, adapter = quantisation_of(model), describe_adapter(model)
        shown = [f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.2f}M" for n in (parameters, trained)]
        adapted = f", {adapter.pop('line')}" if adapter else ""
        precision = " ".join(filter(None, [quantisation, str(model.dtype).removeprefix("torch.")]))
        return {
            "line": f"{self.model_name} ({shown[0]} parameters, {shown[1]} trained{adapted}, {precision})",
            "name_or_path": arguments.model_name_or_path,
            "revision": arguments.model_revision,
            "start": self.trainer.start_description,
            "start_base": self.trainer.start_base,
            "start_adapter": self.trainer.start_adapter,
            "quantisation": quantisation,
            "quantisation_options": four_bit_options(self.trainer.base_models()[0]),
            "peft": adapter is not None,
            "adapter": adapter,
            "parameters": parameters,
            "trained_parameters": trained,
        }

    def _save_model(self) -> None:
        trainer, folder = self.trainer, self.args.training.output_dir
        trainer.save_model(folder)
        trainer.create_model_card()
        head = "Seq2SeqLM" if trainer.model.config.is_encoder_decoder else "CausalLM"
        auto = "peft.AutoPeftModelFor" if is_peft_model(trainer.model) else "transformers.AutoModelFor"
        self.summary.saved = {
            "saved": f"{folder}: the model, README.md, summary.json, log.jsonl",
            "look at": f"{folder}/{PAGE}",
            "load with": f'{auto}{head}.from_pretrained("{folder}")',
        }


class RemoveEarlierSummary(TrainerCallback):
    """Remove the ``summary.json`` of an earlier run when training begins, so that a refused start removes nothing."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the file on the process that writes it."""
        if args.should_save:
            (Path(args.output_dir) / "summary.json").unlink(missing_ok=True)


# Options whose values are secrets, as a flag or in a mapping such as a judge's.
_SECRET = re.compile(
    r"""((?:hub_token|api_?key|password|secret|authorization)['"]?\s*[:=]\s*)(?:'[^']*'|"[^"]*"|[^\s,}]+)""", re.I
)


def without_secrets(text: str) -> str:
    """Replace the values of secrets by dots.

    >>> without_secrets("--judge={model: m, api_key: sk-1} --hub_token=hf_1 --max_new_tokens=3")
    '--judge={model: m, api_key: ...} --hub_token=... --max_new_tokens=3'
    """
    return _SECRET.sub(lambda found: f"{found[1]}...", text)


def command_line(command: str, argv: Sequence[str]) -> str:
    """Return the command as it was given, for the page; secrets are left out."""
    argv = ["..." if before == "--hub_token" else token for before, token in zip(["", *argv], argv, strict=False)]
    return " ".join(["contrastive-align", command, *(shlex.quote(without_secrets(token)) for token in argv)])


def given_settings(args: Arguments) -> dict[str, Any]:
    """Return the options that were given, as JSON can hold them; secrets are left out."""
    found = {}
    for name in sorted(args.given - {"hub_token"}):
        for part in (args.script, args.training, args.model):
            if hasattr(part, name):
                value = getattr(part, name)
                plain = value if isinstance(value, bool | int | float | None) else without_secrets(str(value))
                found[name] = plain
                break
    return found


# As Run.demo_model and Run.demo_data, of all commands.
DEMO_MODEL = {"model_name_or_path": demo.MODEL_PATH, "gradient_checkpointing": False}
DEMO_DATA = {"lr_scheduler_type": "cosine", "save_strategy": "no"}


def check_model_flags(args: Arguments) -> None:
    """Refuse flags without effect (LoRA, quantisation, splits), and paths that are not there or of the wrong kind."""
    named = {"model_name_or_path": args.model, "dataset_name": args.script, "output_dir": args.training}
    for option in sorted(named.keys() & args.given):
        if getattr(named[option], option) == "":
            raise UsageError(f"--{option} is empty, expected a name. Leave it out for the default.")
    splits = sorted({"dataset_config", "dataset_train_split", "dataset_streaming"} & args.given)
    if splits and (not args.dataset or str(args.dataset).endswith(".txt")):
        raise UsageError(
            f"--{splits[0]} belongs to a data set with splits, and {args.dataset or 'none'} is given. Leave it out."
        )
    lora = sorted(name for name in args.given if name.startswith(("lora_", "use_rslora", "use_dora")))
    quantised = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(args.model, name)]
    alone = quantised or ([] if "use_peft" in args.given else lora)
    if alone and not args.model.use_peft:
        raise UsageError(f"--{alone[0]} is given without --use_peft, which it needs. Add --use_peft.")
    resume = str(args.training.resume_from_checkpoint or "")
    if resume.lower() not in ("", "true", "false", "none") and not Path(resume).is_dir():
        raise UsageError(f"--resume_from_checkpoint: no folder '{resume}' (looked in {Path.cwd()}).")
    name = str(args.model.model_name_or_path or "")
    if "model_revision" in args.given and Path(name).is_dir():
        raise UsageError(f"--model_revision names a version on the hub, and '{name}' is a folder. Leave it out.")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UsageError(f"No folder '{name}' for --model_name_or_path (looked in {Path.cwd()}).")
    if Path(name).is_file():
        raise UsageError(f"--model_name_or_path: '{name}' is a file, expected a folder or a hub id.")
    has_model = any((Path(name) / file).is_file() for file in ("config.json", ADAPTER_CONFIG))
    if name and Path(name).is_dir() and not has_model:
        raise UsageError(f"--model_name_or_path: '{name}' holds no model: neither config.json nor {ADAPTER_CONFIG}.")
    if args.training.output_dir and Path(args.training.output_dir).is_file():
        raise UsageError(f"--output_dir: '{args.training.output_dir}' is a file, expected a folder, or a new name.")


def model_arguments(args: Arguments) -> dict[str, Any]:
    """Return a trainer's keywords for the model, its quantisation and its adapter."""
    model, training = args.model, args.training
    init = {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    init |= {} if model.model_name_or_path == demo.MODEL_PATH else {"revision": model.model_revision}
    training.model_init_kwargs = init | (training.model_init_kwargs or {})
    if isinstance(model.lora_target_modules, str) and model.lora_target_modules.isidentifier():
        # TRL unpacks a list of one name, and peft would read the bare name as a regular expression.
        model.lora_target_modules = [model.lora_target_modules]
    # A 4-bit base computes in the weights' dtype; where they bring their own, in that of training.
    trained_in = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    quantised = dataclasses.replace(model, dtype=trained_in if model.dtype in ("auto", None) else model.dtype)
    return {
        "model": model.model_name_or_path,
        "args": training,
        "quantization_config": get_quantization_config(quantised),
        "peft_config": get_peft_config(model),
    }


@contextlib.contextmanager
def picture_saved(summary: Summary, path: Path) -> Iterator[None]:
    """Add a picture to the summary, or the reason why it could not be drawn."""
    try:
        yield
        summary.saved["look at"] += f", {path}"
    except (ImportError, ValueError) as error:
        summary.saved["picture"] = f"none: {error}"


def print_on_main(text: str) -> None:
    """Print on the main process."""
    if PartialState().is_main_process:
        print(text, flush=True)
