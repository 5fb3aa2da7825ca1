"""hedgerow doctor: what is installed here, and what can be used."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from hedgerow.cli.frame import AsJson, app
from hedgerow.errors import RunFailed
from hedgerow.files import to_json
from hedgerow.terminal import show

if TYPE_CHECKING:
    from hedgerow.doctor import Device, Diagnosis


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed here, and which features can be used.

    Example: hedgerow doctor
    """
    from hedgerow import doctor

    found = doctor.examine()
    if as_json:
        content = asdict(found)
        for feature, values in zip(found.features, content["features"], strict=True):
            values["command"] = feature.command
        show(to_json(content | {"problem": found.problem}, ensure_ascii=False, indent=2))
    else:
        _say(found)
    if found.problem:
        raise RunFailed(found.problem)


def _say(found: Diagnosis) -> None:
    from hedgerow import console

    devices = [f"{d.name} ({d.description}, {_memory(d)})" for d in found.devices]
    silent = f"cannot be asked ({found.silent}): mend its driver, or give model.device=cpu"
    rows = [
        ("hedgerow", found.hedgerow),
        ("Python", found.python),
        ("platform", found.platform),
        ("torch", found.torch or "cannot be imported"),
        *([("GPU", silent)] if found.silent else []),
        *(("device", device) for device in devices),
        ("threads of torch", str(found.threads)),
        ("processors", f"{found.processors}, of which {found.free_processors} free"),
    ]
    console.table("", ["here", ""], rows, numbers=False)
    libraries = [
        (each.name, each.installed or "missing", each.needed, "yes" if each.will_do else "no")
        for each in found.libraries
    ]
    console.table("", ["library", "version", "needed", "will do"], libraries, numbers=False)
    features = [
        (each.name, "no" if each.lacks else "yes", ", ".join(map(str, each.lacks)), each.command)
        for each in found.features
    ]
    console.table("", ["feature", "usable", "lacks", "to add it"], features, numbers=False)


def _memory(device: Device) -> str:
    from hedgerow import console

    if device.memory is None:
        return "memory unknown"
    return console.size(device.memory)
