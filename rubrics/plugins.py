"""Find a class by an id: built in, registered by an installed package, or named as `module:Class`."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import traceback
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

from k2rl.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """The classes of one sort a run may name. All errors are `ConfigError`s of one line."""

    def __init__(
        self, noun: str, base: type[Any], group: str, builtin: Mapping[str, str], listing: str
    ) -> None:
        """`noun` names the sort in messages, `base` is what every class must subclass, `group` the
        entry-point group, `builtin` maps ids to `module:Class`, `listing` tells how to see all ids.
        """
        self.noun = noun
        self.base = base
        self.group = group
        self.builtin = dict(builtin)
        self.listing = listing

    def available(self) -> dict[str, str]:
        """Every id with the first line of its class's docstring, or the reason it cannot be loaded."""
        return {id: self._describe(id) for id in sorted(self._targets())}

    def broken(self) -> dict[str, ConfigError]:
        """Every id whose class cannot be used, with the reason; a traceback of the plug-in is its note."""
        found: dict[str, ConfigError] = {}
        for id in sorted(self._targets()):
            try:
                self.resolve(id)
            except ConfigError as error:
                found[id] = error
        return found

    def resolve(self, id: str) -> type[T]:
        """The class behind an id.

        Raises:
            ConfigError: if the id is unknown or claimed twice, or its class cannot be used.
        """
        if ":" in id:
            return self._load(id)
        targets = self._targets()
        if id not in targets:
            raise ConfigError(
                f"unknown {self.noun} {id!r}{_did_you_mean(id, targets)}; {self.listing}, or name a class "
                "as module:Class"
            )
        first, *others = targets[id]
        if others:
            raise ConfigError(
                f"{self.noun} {id!r} is claimed by {' and '.join(targets[id])}: name the one you mean as "
                "module:Class, or uninstall the other"
            )
        return self._load(first)

    def make(self, id: str, kwargs: Mapping[str, Any]) -> T:
        """An instance of the class behind an id.

        Raises:
            ConfigError: as `resolve`, or if the constructor does not accept these arguments.
        """
        found = self.resolve(id)
        signature = inspect.signature(found)
        try:
            signature.bind(**kwargs)
        except TypeError as error:
            accepted = ", ".join(signature.parameters) or "no arguments"
            raise ConfigError(f"{self.noun} {id!r}: {_one_line(error)}; it takes: {accepted}") from error
        try:
            return found(**kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.noun} {id!r}: {_one_line(error)}") from error
        except Exception as error:  # whatever else a user's constructor raises
            raise ConfigError(f"{self.noun} {id!r}: {type(error).__name__}: {_one_line(error)}") from error

    def _targets(self) -> dict[str, list[str]]:
        """For each id, the different `module:Class` that claim it."""
        targets = {id: [target] for id, target in self.builtin.items()}
        for point in entry_points(group=self.group):
            claims = targets.setdefault(point.name, [])
            target = f"{point.module}:{point.attr}"
            if target not in claims:
                claims.append(target)
        return targets

    def _describe(self, id: str) -> str:
        try:
            documentation = self.resolve(id).__doc__ or ""
        except ConfigError as error:
            return f"cannot be loaded: {error}"
        return next(iter(documentation.strip().splitlines()), "")

    def import_module(self, module_name: str, target: str) -> ModuleType:
        """The module that `target` names.

        Raises:
            ConfigError: it cannot be imported; a note has its traceback, if it is there at all.
        """
        try:
            return importlib.import_module(module_name)
        except Exception as error:  # whatever a user's module raises while it is imported
            refused = ConfigError(
                f"{self.noun} {target!r}: cannot import {module_name} "
                f"({type(error).__name__}: {_one_line(error)}); is it installed, or its folder on PYTHONPATH?"
            )
            if not (isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]):
                refused.add_note(_own_traceback(error))
            raise refused from error

    def _load(self, target: str) -> type[T]:
        module_name, _, class_name = target.partition(":")
        if not module_name or not class_name:
            raise ConfigError(f"{self.noun} {target!r}: write it as module:Class")
        module = self.import_module(module_name, target)
        try:
            found = functools.reduce(getattr, class_name.split("."), cast("Any", module))
        except AttributeError as error:
            names = [name for name, value in vars(module).items() if inspect.isclass(value)]
            raise ConfigError(
                f"{self.noun} {target!r}: {module_name} has no class {class_name}"
                f"{_did_you_mean(class_name, names)}"
            ) from error
        if not (inspect.isclass(found) and issubclass(found, self.base)):
            raise ConfigError(
                f"{self.noun} {target!r} is not a subclass of {self.base.__module__}.{self.base.__name__}"
            )
        if inspect.isabstract(found):
            missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
            raise ConfigError(f"{self.noun} {target!r} does not implement: {missing}")
        return cast("type[T]", found)


def _did_you_mean(word: str, choices: Mapping[str, Any] | list[str]) -> str:
    matches = difflib.get_close_matches(word, list(choices), n=3)
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


def _own_traceback(error: BaseException) -> str:
    """A traceback without the frames that import."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen importlib")
        and frame.filename not in (__file__, importlib.__file__)
    ]
    shown = traceback.StackSummary.from_list(frames).format() + traceback.format_exception_only(error)
    return "Traceback of the plug-in (most recent call last):\n" + "".join(shown).rstrip()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
