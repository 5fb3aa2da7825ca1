"""What is installed here: versions, devices, and what each extra of the package lacks.

What is needed is what the package's own metadata says, so that there is no second list of it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from hedgerow import __version__
from hedgerow.errors import UserError, reason_of
from hedgerow.lazy import torch
from hedgerow.workers import Workers, processors

_NO_FEATURES = ("all", "dev", "docs")
"""Extras that are for no feature: all together, and what develops and documents this package."""


@dataclass(frozen=True)
class Library:
    """A library that is needed.

    Attributes:
        name: of the package.
        needed: versions that will do, as `>=0.50,<1`; empty where all will.
        installed: version that is installed; None where none is.
        will_do: whether it is one of those.
    """

    name: str
    needed: str
    installed: str | None
    will_do: bool

    def __str__(self) -> str:
        """The library as one that is needed, with what is there instead where something is."""
        there = "" if self.installed is None else f" (here is {self.installed})"
        return f"{self.name}{self.needed}{there}"


@dataclass(frozen=True)
class Feature:
    """What an extra of the package is for.

    Attributes:
        name: of the extra.
        lacks: libraries that it needs and that are not here, or in another version.
    """

    name: str
    lacks: tuple[Library, ...]

    @property
    def command(self) -> str:
        """Command that adds what it lacks; empty where it lacks nothing."""
        return f"pip install 'hedgerow[{self.name}]'" if self.lacks else ""


@dataclass(frozen=True)
class Device:
    """A device that torch computes on.

    Attributes:
        name: as `model.device` takes it: `cpu`, `cuda:0`, `mps`.
        description: what it is called by who made it.
        memory: bytes that it has in all; None where the system does not say.
    """

    name: str
    description: str
    memory: int | None


@dataclass(frozen=True)
class Diagnosis:
    """What is installed here.

    Attributes:
        hedgerow: version of this package.
        python: version of the interpreter.
        platform: operating system and processor.
        torch: version of torch; None where it cannot be imported.
        broken: why it cannot be; empty where it can.
        devices: those that torch finds, the CPU last.
        silent: why GPUs that are here do not say what they are; empty where all do.
        threads: number of threads that torch computes in; 0 where it cannot be imported.
        processors: number of processors that this process may use.
        free_processors: number of those that have nothing to do, at least 1; on Linux alone, and 1
            elsewhere. It is what `--workers auto` takes.
        libraries: what every installation needs.
        features: the extras.
    """

    hedgerow: str
    python: str
    platform: str
    torch: str | None
    broken: str
    devices: tuple[Device, ...]
    silent: str
    threads: int
    processors: int
    free_processors: int
    libraries: tuple[Library, ...]
    features: tuple[Feature, ...]

    @property
    def problem(self) -> str:
        """What keeps this installation from working, and what mends it; empty where all is well."""
        if lacking := [str(library) for library in self.libraries if not library.will_do]:
            return f"hedgerow needs {', '.join(lacking)}: pip install hedgerow"
        if self.broken:
            return (
                f"torch is installed, but cannot be imported ({self.broken}): "
                "pip install --force-reinstall torch"
            )
        return ""


def examine() -> Diagnosis:
    """Look at what is installed here, which takes as long as importing torch.

    Raises:
        UserError: this package is on the path without having been installed.
    """
    try:
        extras = metadata.metadata("hedgerow").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        raise UserError(
            "hedgerow is on Python's path, but is not installed, so that nothing says what it "
            "needs: pip install hedgerow, or pip install --editable FOLDER"
        ) from None
    version, broken, silent, devices, threads = None, "", "", list[Device](), 0
    try:
        version, threads = torch.__version__, torch.get_num_threads()
        devices.append(_cpu())
    # Missing, of another processor or system, or damaged.
    except (ImportError, OSError, RuntimeError) as error:
        broken = reason_of(error)
    try:
        devices[:0] = _gpus() if devices else []
    except RuntimeError as error:  # of a driver that does not fit, or that has lost its GPU
        silent = reason_of(error)
    return Diagnosis(
        hedgerow=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        torch=version,
        broken=broken,
        devices=tuple(devices),
        silent=silent,
        threads=threads,
        processors=processors(),
        free_processors=Workers.of("auto").count,
        libraries=tuple(map(_found, _requirements("hedgerow"))),
        features=tuple(
            Feature(extra, tuple(_lacking(Requirement(f"hedgerow[{extra}]"))))
            for extra in sorted(set(extras) - set(_NO_FEATURES))
        ),
    )


def _requirements(package: str, extra: str = "") -> list[Requirement]:
    """What a package needs on this platform; of an extra, what that needs beside."""
    every = [Requirement(text) for text in metadata.requires(package) or []]
    core = [each for each in every if each.marker is None or each.marker.evaluate({"extra": ""})]
    if not extra:
        return core
    rest = [each for each in every if each not in core]
    return [each for each in rest if each.marker and each.marker.evaluate({"extra": extra})]


def _lacking(requirement: Requirement) -> Iterator[Library]:
    """What a requirement lacks: its package, or what the extras of it need that are asked for."""
    library = _found(requirement)
    if not library.will_do:
        yield library
        return
    for extra in sorted(requirement.extras):
        for each in _requirements(requirement.name, extra):
            yield from _lacking(each)


def _found(requirement: Requirement) -> Library:
    name, needed = requirement.name, requirement.specifier
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Library(name, str(needed), installed=None, will_do=False)
    will_do = needed.contains(installed, prereleases=True)
    return Library(name, str(needed), installed, will_do)


def _gpus() -> list[Device]:
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(Device(f"cuda:{index}", gpu.name, gpu.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple's GPU", torch.mps.recommended_max_memory()))
    return found


def _cpu() -> Device:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not of POSIX, or without these numbers
        pages, size = -1, 0
    # -1 is what a system says that has no answer.
    return Device("cpu", platform.machine(), pages * size if pages > 0 else None)
