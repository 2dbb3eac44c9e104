"""What goes wrong in a command becomes a sentence: the user's errors with exit status 2, the package's own with 1."""

from __future__ import annotations

import contextlib
import dis
import logging
import platform
import re
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from contrastive_align.launch.usage import UsageError, as_flags


PACKAGE = Path(__file__).resolve().parents[1]
REPORTED = ("contrastive_align", "torch", "transformers", "trl", "accelerate", "peft", "datasets")
PACKAGES = {"site-packages", "dist-packages"}  # folders
SECRET = ("hub_token",)  # options whose values are not repeated
# What a command line, its files, its data or this machine can cause, beside the errors that only other packages define.
USERS = (ValueError, OSError, ImportError, NotImplementedError, MemoryError)
TEXTS = ("metric_for_best_model", "Failed to import")  # in an error of transformers of whatever class
OF_PACKAGES = {
    "torch": ("OutOfMemoryError",),
    "safetensors": ("SafetensorError",),
    "jinja2": ("TemplateError",),
    "datasets.exceptions": ("DatasetsError",),
    "contrastive_align.openai_client": ("CallError",),
    "contrastive_align.trainers.reference": ("ReferenceMismatch",),
}


class Fault(SystemExit):
    """A failure of the package itself; prints the traceback, what to report, and exits with status 1."""

    def __init__(self, error: BaseException, argv: Sequence[str]):
        traceback.print_exception(error)
        print(f"error: {_report(error, argv)}", file=sys.stderr)
        super().__init__(1)


@contextlib.contextmanager
def in_sentences(argv: Sequence[str]) -> Iterator[None]:
    """Answer an exception with a sentence; with ``--log_level=debug`` its traceback is printed beside it.

    An exception whose class the calling program has defined is handed on to it.

    Args:
        argv: the command line, which a report of a failure repeats.

    Raises:
        UsageError: what the user can change.
        Fault: what the user cannot.
    """
    imported = set(sys.modules)  # by the calling program; later ones are files that options name
    try:
        yield
    except SystemExit as error:  # a sentence was printed already
        if error.__cause__ is not None and _debugs(argv) and not isinstance(error, Fault):
            traceback.print_exception(error.__cause__)
            error.__cause__ = None  # one command may run another
        raise
    except BrokenPipeError:  # of the output: for the console script
        raise
    except Exception as error:
        if _is_callers(error, imported):
            raise
        said = _sentence(error, argv)
        if said is None:
            raise Fault(error, argv) from error
        if _debugs(argv):
            traceback.print_exception(error)
            raise UsageError(said) from None
        raise UsageError(f"{said}\n(--log_level=debug shows where)") from error


def _sentence(error: Exception, argv: Sequence[str]) -> str | None:
    """Return what is said of an error that the user can change; None for a failure of the package."""
    frames = traceback.extract_tb(error.__traceback__)
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    known = isinstance(error, _user_errors()) or any(part in text for part in TEXTS)
    text = _as_typed(as_flags(re.sub(r"^\[Errno \d+\] ", "", text)), argv) or type(error).__name__
    if place := _place_in_user_code(frames):
        return f"{place} raised {type(error).__name__}: {text}"
    if _is_out_of_memory(error):
        return f"out of memory: {text.splitlines()[0]} Lower per_device_train_batch_size or the lengths."
    if _is_lost_process(error):
        lost = re.sub(r"^\[\S+\] |[. ]+$", "", text.splitlines()[0])
        return (
            f"another process of this run has ended, and this one cannot go on alone ({lost}). Its own "
            "message says why. The same command line with --resume_from_checkpoint=true goes on."
        )
    if (loaded := _what_was_loaded(error)) is not None:
        first = text.splitlines()[0]
        if loaded in first:
            return first
        if isinstance(error, OSError) and not Path(loaded).is_dir():
            where = f"no such folder in {Path.cwd()}"
            return f"{loaded!r} ({where}) cannot be loaded: {first} Give the folder of a model, or a hub id."
        return f"{loaded!r} cannot be loaded: {first}"
    # An exact ValueError in this package that no 'raise' made is a slip, such as a tuple of another length.
    slipped = type(error) is ValueError and _is_own(frames[-1]) and not _is_raised(error)
    return text if known and not slipped else None


def _user_errors() -> tuple[type[BaseException], ...]:
    """Return ``USERS``, and those of ``OF_PACKAGES`` whose module is imported: another one was not raised."""
    found = [
        getattr(sys.modules[module], name)
        for module, names in OF_PACKAGES.items()
        for name in names
        if hasattr(sys.modules.get(module), name)
    ]
    return (*USERS, *found)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _is_lost_process(error: Exception) -> bool:
    """Whether a collective of torch.distributed (gloo raises RuntimeError, NCCL a class of its own) lost its peer."""
    return "gloo/" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")


def _is_own(frame: traceback.FrameSummary) -> bool:
    return PACKAGE in Path(frame.filename).resolve().parents


def _is_raised(error: Exception) -> bool:
    """Whether a ``raise`` statement made the error."""
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def _is_callers(error: Exception, imported: set[str]) -> bool:
    name = type(error).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    return name in imported and file is not None and _is_users(Path(file).resolve())


def _is_users(file: Path) -> bool:
    """Whether a source file is neither Python's nor a package's."""
    library = Path(sysconfig.get_path("stdlib")).resolve() in file.parents or not file.is_file()
    return not (library or PACKAGE in file.parents or PACKAGES & set(file.parts))


def _place_in_user_code(frames: Sequence[traceback.FrameSummary]) -> str | None:
    """Return where the user's own code raised the error, or None where the code is a package's."""
    file = Path(frames[-1].filename).resolve()
    return f"{file.name}, line {frames[-1].lineno}, in {frames[-1].name}," if _is_users(file) else None


def _what_was_loaded(error: Exception) -> str | None:
    """Return what a ``from_pretrained`` was called with, where the error was raised in one."""
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_code.co_name == "from_pretrained":
            values = place.tb_frame.f_locals
            return str(values.get("pretrained_model_name_or_path", values.get("model_id", "the model")))
        place = place.tb_next
    return None


def _as_typed(text: str, argv: Sequence[str]) -> str:
    """Write an option at the beginning of a sentence as the flag that was given."""
    name = re.match(r"(\w*)(?=[ =:\[]|$)", text)
    flags = {token.partition("=")[0].replace("-", "_") for token in argv}
    return f"--{text}" if name and f"__{name[1]}" in flags else text


def _debugs(argv: Sequence[str]) -> bool:
    asked = " ".join(argv).replace("-", "_").replace("__log_level ", "__log_level=")
    return "__log_level=debug" in asked or logging.getLogger("transformers").isEnabledFor(logging.DEBUG)


def _report(error: BaseException, argv: Sequence[str]) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{Path(frame.filename).name}, line {frame.lineno}" for frame in frames if _is_own(frame)]
    where = f", in {own[-1]}" if own else ""
    if not _is_own(frames[-1]):
        parts = Path(frames[-1].filename).parts
        after = next((i for i, part in enumerate(parts) if part in PACKAGES), len(parts) - 2)
        where = f", in {parts[after + 1].removesuffix('.py')}{f', called from {own[-1]}' if own else ''}"
    return (
        f"contrastive_align failed, and as far as it can tell your command line is right: {type(error).__name__}: "
        f"{error}{where}. Please report the traceback above with these lines.\n"
        f"  command line: contrastive-align {shlex.join(_without_secrets(argv))}\n"
        f"  versions: {', '.join(f'{name} {_version(name)}' for name in REPORTED)}, "
        f"Python {platform.python_version()}, {platform.platform()}"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _without_secrets(argv: Sequence[str]) -> list[str]:
    """Return a command line without the values of ``SECRET`` options.

    >>> _without_secrets(["reward", "--hub_token=hf_abc", "--hub-token", "hf_abc"])
    ['reward', '--hub_token=...', '--hub-token', '...']
    """
    shown: list[str] = []
    for token in argv:
        name, equals, _ = token.partition("=")
        secret = name.lstrip("-").replace("-", "_") in SECRET
        after = bool(shown) and shown[-1].lstrip("-").replace("-", "_") in SECRET
        shown.append(f"{name}=..." if secret and equals else "..." if after else token)
    return shown
