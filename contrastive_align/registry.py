"""Functions that are named by text: those of the package, and the user's own from a file, a module or a call."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)


class NoSuchFunction(ValueError, AttributeError):
    """A file or module that has no such function."""


class Registry(dict[str, Any]):
    """Names -> functions (or classes) of one kind: the package's own, and those that are registered.

    Args:
        kind: what they are, in messages.
        own: those of the package.
        check: ``check(name, function)`` raises ValueError for one that cannot serve.
    """

    def __init__(self, kind: str, own: Mapping[str, Any], check: Callable[[str, Any], None] | None = None) -> None:
        super().__init__(own)
        self.kind, self._check = kind, check
        self.hashes: dict[str, str] = {}  # of the sources of those that are not the package's

    def __setitem__(self, name: str, function: Any) -> None:
        """Set a function, also in the place of one of the package's.

        Raises:
            ValueError: it cannot serve.
        """
        self.hashes.pop(name, None)
        if not is_own(function):
            if self._check is not None:
                self._check(name, function)
            self.hashes[name] = source_hash(function)
        super().__setitem__(name, function)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.hashes.pop(name, None)

    def register(self, name: str, function: Any) -> Any:
        """Set a function under a name that is not the package's, and return it.

        Raises:
            ValueError: a name of the package's, or a function that cannot serve.
        """
        if name in self and name not in self.hashes:
            raise ValueError(f"The {self.kind} {name!r} is the package's own. Give {place_of(function)} another name.")
        self[name] = function
        return function

    def find(self, given: Any) -> str | None:
        """Return the name of what is given: a name, ``file.py:function``, ``package.module:function``, or a callable.

        A callable is registered under ``module.qualname``, which a new process imports. None: no such name.

        Raises:
            ValueError, FileNotFoundError: there is no such function, or it cannot serve.
        """
        if callable(given):
            written = _written(given)
            name = base = f"{written.__module__}.{written.__qualname__}"
            unfindable, number = "<" in name or name.startswith("__main__."), 1
            while "<" in name and self.hashes.get(name, source_hash(given)) != source_hash(given):
                number += 1
                name = f"{base}#{number}"  # another lambda, or the same closure over other values
            if name not in self and unfindable:
                logger.warning(
                    f"The {self.kind} {name} ({place_of(given)}) cannot be found by its name: a run is resumed only "
                    "with it given again. Put it into a file, 'file.py:function'."
                )
            self[name] = given
            return name
        if ":" in given:
            self[given] = load_function(given)
            return given
        if given in self:
            return given
        module, _, name = given.rpartition(".")
        if not module:
            return None
        try:
            self[given] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"The {self.kind} {given!r} is not registered in this process and cannot be imported ({error}). Give "
                "the function itself, or 'file.py:function'."
            ) from error
        return given

    def describe(self, name: str) -> str:
        """Return the name, with the place of a function that is not the package's."""
        return f"{name} ({place_of(self[name])})" if name in self.hashes else name


def place_of(function: Any) -> str:
    """Return the file and line where a function or class is written, or what is known of it."""
    written = _written(function)
    try:
        return f"{Path(inspect.getsourcefile(written) or '?').name}:{inspect.getsourcelines(written)[1]}"
    except (TypeError, OSError):
        return repr(function)


def is_own(function: Any) -> bool:
    """Whether a function or class is written in this package."""
    try:
        return Path(__file__).parent in Path(inspect.getfile(_written(function))).parents
    except (TypeError, OSError):
        return False


def source_hash(function: Any) -> str:
    """Hash the source of a function or class, or its code where there is none, and the plain values bound to it."""
    written = _written(function)
    try:
        source = inspect.getsource(written)
    except (TypeError, OSError):
        code = getattr(written, "__code__", None)
        constants = [value for value in code.co_consts if _is_plain(value)] if code is not None else []
        named = f"{written.__module__}.{written.__qualname__}"
        source = repr((code.co_code, code.co_names, constants)) if code is not None else named
    values = [*function.args, *sorted(function.keywords.items())] if isinstance(function, partial) else []
    values += [cell.cell_contents for cell in getattr(written, "__closure__", None) or ()]
    bound = repr([value for value in values if _is_plain(value)])
    return hashlib.sha256((source + bound).encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    """Whether the value's text is the same in every process."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def hash_of_user(function: Any) -> str | None:
    """Return :func:`source_hash`, or None for what is the package's; of a sum or product, that of its parts."""
    if parts := getattr(function, "parts", None):
        hashes = [hash_of_user(part) for part in parts]
        return hashlib.sha256(repr(hashes).encode()).hexdigest() if any(hashes) else None
    return None if is_own(function) else source_hash(function)


def _written(function: Any) -> Any:
    """Return what has a source: the function of a partial, the class of an instance."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if inspect.isroutine(function) or inspect.isclass(function) else type(function)


def load_function(text: Any) -> Callable:
    """Return the function that ``file.py:function`` or ``package.module:function`` names; a file is read anew.

    Raises:
        ValueError: another text, or a module that cannot be imported.
        FileNotFoundError, NoSuchFunction: there is no such file, or no such function in it.
    """
    place, _, name = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not place or not name:
        raise ValueError(f"found {text!r}, expected 'file.py:function' or 'package.module:function'.")
    module = _import(place)
    if not callable(getattr(module, name, None)):
        there = [key for key, item in vars(module).items() if inspect.isfunction(item) and not key.startswith("_")]
        raise NoSuchFunction(f"{place} has no function {name!r}. It has: {', '.join(there) or 'none'}.")
    return getattr(module, name)


def _import(place: str) -> Any:
    file = Path(place).expanduser().resolve() if place.endswith(".py") else None
    if file and not file.is_file():
        raise FileNotFoundError(f"No file {place!r} (looked for {file}), expected 'file.py:function'.")
    try:
        return _load_file(file) if file else importlib.import_module(place)
    except Exception as error:
        hint = "" if file else ". For a file write 'file.py:function'."
        raise ValueError(
            f"{file or place} could not be imported, which raised {type(error).__name__}: {error}{hint}"
        ) from error


def _load_file(file: Path) -> Any:
    name = f"features_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class up by its module
    try:  # not by exec_module, whose cache of bytecode takes an edit within the same second for the same file
        exec(spec.loader.source_to_code(file.read_bytes(), str(file)), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module
