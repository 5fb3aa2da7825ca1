"""Plug-ins: what an experiment names is found here, whether it is hedgerow's own or anybody's.

Three kinds of name are known: one of hedgerow's own (`flora`); one that an installed package
declares as an entry point (group `hedgerow.methods`, `hedgerow.metrics`, `hedgerow.optimizers`,
`hedgerow.objectives` or `hedgerow.trainers`); and `package.module:Class`, for whatever can be
imported.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hedgerow.errors import UserError, did_you_mean
from hedgerow.optional import check_installed
from hedgerow.sentences import check_no_boolean, sentence


class Plugin(BaseModel):
    """A class that an experiment names: its fields are its options there.

    One of hedgerow's own, or of an entry point, says its name (`name: str = "flora"`). Others need
    none: theirs is `package.module:Class`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    section: ClassVar[tuple[str, ...]] = ()
    """Keys that lead to its options in the experiment file."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Modules that it imports when it is used, by the names of their packages at the top, and that
    not every installation has. They are looked for before a run begins."""

    name: str
    """Name in the experiment file: one of hedgerow's own, one that an installed package declares,
    or `package.module:Class`."""

    def __init__(self, /, **options: Any) -> None:
        """Check the options.

        Raises:
            UserError: naming the option that is wrong.
        """
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise UserError(sentence(error, type(self), self.section, self.see())) from None

    def check_installed(self) -> None:
        """Raise a `UserError` where a library is missing, its own or one of the parts in it."""
        check_installed(f"{'.'.join(self.section)}: {self.name}", *self.libraries)
        for part in (getattr(self, field) for field in type(self).model_fields):
            if isinstance(part, Plugin):
                part.check_installed()

    @classmethod
    def see(cls) -> str | None:
        """Command that shows the options; None where it is `hedgerow explain` with their keys."""
        return None

    @classmethod
    def own_name(cls) -> str | None:
        """Name that this class, not one that it inherits from, gives itself."""
        # A subclass of FLoRA is not flora.
        declared = "name" in inspect.get_annotations(cls)
        return cls.model_fields["name"].default if declared else None

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        check_no_boolean(value, cls, info.field_name)
        return value

    @model_validator(mode="before")
    @classmethod
    def _named(cls, options: Any) -> Any:
        if not isinstance(options, dict):
            return options
        named: dict[str, Any] = {"name": cls.own_name() or dotted_name(cls)} | options
        if named["name"] != dotted_name(cls) and cls.own_name() not in (None, named["name"]):
            raise ValueError(f"the name of {cls.__name__} is {cls.own_name()!r}")
        return named


def dotted_name(kind: type) -> str:
    """Name by which a class can be imported: `package.module:Class`."""
    return f"{kind.__module__}:{kind.__qualname__}"


_P = TypeVar("_P", bound=Plugin)


class Registry(Mapping[str, type[_P]], Generic[_P]):
    """Plug-ins of one kind by name: hedgerow's own, and those of installed packages.

    It is a mapping of what can be listed; `find` knows dotted names as well.
    """

    def __init__(self, what: str, base: type[Any], package: str, *, see: str) -> None:
        """Look up names when they are asked for.

        Args:
            what: what one is called in sentences, as "method".
            base: the class that all of them inherit from.
            package: the package whose modules hold hedgerow's own; any class there that names
                itself is one.
            see: the command that shows what there is, for messages.
        """
        self.what, self._base, self._package, self._see = what, base, package, see
        self._group = f"hedgerow.{what}s".replace(" ", "_")

    def __getitem__(self, name: str) -> type[_P]:
        if name in self._own:
            return self._own[name]
        return self._checked(self._installed[name].load(), name)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *(name for name in self._installed if name not in self._own)])

    def __len__(self) -> int:
        return len(self._own.keys() | self._installed.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._installed

    def find(self, name: str, key: str) -> type[_P]:
        """Class with a name: a listed one, or `package.module:Class`.

        Args:
            name: as the experiment file has it.
            key: where it stands there, for the sentence, as "method.name".

        Raises:
            UserError: there is none, or it is something else.
        """
        try:
            if name in self:
                return self[name]
            if ":" in name:
                return self._imported(name)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            # Anything may go wrong in somebody else's module.
            raise UserError(
                f"`{key}`: {name} cannot be imported ({type(error).__name__}: {error})"
            ) from error
        close = did_you_mean(name, self)
        raise UserError(
            f"`{key}`: there is no {name!r}{close} (known: {', '.join(self)}; your own: "
            f"package.module:Class); see `{self._see}`"
        )

    def named(
        self, given: str | Mapping[str, Any], key: str, unnamed: str
    ) -> tuple[type[_P], dict[str, Any]]:
        """Class that a name, or a mapping with options, stands for, and these options.

        Args:
            given: as the experiment file has it.
            key: where it stands there, as "method.server".
            unnamed: sentence about a mapping that has no name.

        Raises:
            UserError: there is none of this name.
        """
        if isinstance(given, str):
            return self.find(given, key), {"name": given}
        name = given.get("name")
        if not isinstance(name, str):
            raise UserError(unnamed)
        return self.find(name, f"{key}.name"), dict(given)

    def chosen(self, given: Any, key: str, unnamed: str) -> Any:
        """Plug-in that a name, or a mapping with options, stands for; others stay as they are.

        The arguments are those of `named`; what is given is not validated yet.

        Raises:
            UserError: there is none of this name, or an option of it is wrong.
        """
        if not isinstance(given, str | dict):
            return given
        kind, options = self.named(given, key, unnamed)
        return kind(**options)

    def _imported(self, name: str) -> type[_P]:
        module, _, path = name.partition(":")
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and imports one that is not
            raise UserError(
                f"{self.what} {name}: there is no module {error.name} in this environment: install "
                "the package, or name its folder in PYTHONPATH"
            ) from None
        for part in path.split("."):
            if not hasattr(found, part):
                hint, where = "", module
                if module == "__main__":
                    where = "this program"
                    hint = (
                        ": a class of a notebook or a script is known only there; define it in a "
                        "module to use it elsewhere"
                    )
                raise UserError(f"{self.what} {name}: {where} has no {path}{hint}")
            found = getattr(found, part)
        return self._checked(found, name)

    def _checked(self, found: Any, name: str) -> type[_P]:
        if not (isinstance(found, type) and issubclass(found, self._base)):
            raise UserError(
                f"{self.what} {name}: is no subclass of {self._base.__module__}."
                f"{self._base.__qualname__}"
            )
        if inspect.isabstract(found):
            lacking = ", ".join(sorted(vars(found)["__abstractmethods__"]))
            raise UserError(f"{self.what} {name}: lacks the function {lacking}: define it")
        return found

    @cached_property
    def _own(self) -> dict[str, type[_P]]:
        own: dict[str, type[_P]] = {}
        package = sys.modules[self._package]
        for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
            for kind in vars(importlib.import_module(module.name)).values():
                if not isinstance(kind, type) or kind.__module__ != module.name:
                    continue
                if not issubclass(kind, self._base):
                    continue
                plugin: type[_P] = kind
                if name := plugin.own_name():
                    own[name] = plugin
        return own

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self._group)}
