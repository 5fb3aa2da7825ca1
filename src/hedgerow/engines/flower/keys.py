"""Keys of the sites: who has joined under a client's name keeps it for as long as the run lasts.

Flower asks every SuperNode for a key that is registered, but anybody may register another key under
a name that is taken, who reaches the SuperLink and is not kept out of its command line's paths.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from pydantic import TypeAdapter

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.files import replacing

KEYS = "sites.json"
"""The file of a run directory that has the fingerprint of the key of each client's site."""
_FILE = TypeAdapter(dict[str, str])


def fingerprint(key: bytes) -> str:
    """Fingerprint of a public key in PEM, as `ssh-keygen -l` prints it: `SHA256:` and base64.

    Of bytes that are no such key, as in a simulation, that of the bytes.
    """
    try:
        text = load_pem_public_key(key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        key = base64.b64decode(text.split()[1])
    except ValueError:
        pass
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


class KnownKeys:
    """Fingerprints of keys by client, of sites that have joined a run under a registered name."""

    def __init__(self, path: Path) -> None:
        """Read those that are known.

        Args:
            path: the file, which need not be there yet.

        Raises:
            UserError: it is damaged.
        """
        self._path = path
        self._known: dict[str, str] = {}
        if path.exists():
            try:
                self._known = _FILE.validate_json(path.read_bytes())
            except ValueError:
                raise UserError(f"{path} is damaged: restore it from a copy") from None

    def check(self, name: str, node: Any, nodes: Iterable[Any]) -> None:
        """Raise `InvalidMessage` unless a SuperNode may join as a client.

        Args:
            name: the client's.
            node: Flower's `NodeInfo` of the SuperNode that says it is this client.
            nodes: of all SuperNodes that are connected.
        """
        if node.name and node.name != name:
            raise InvalidMessage(f"it is registered as {node.name}, but says it is {name}")
        own, known = fingerprint(node.public_key), self._known.get(name)
        if known is not None and own != known:
            raise InvalidMessage(
                f"{name} has the key {known} in this run, and this is {own}: if the site has a new "
                f"key, remove {name} from {self._path.name} in the run's directory"
            )
        if known is not None:
            return
        rivals = {fingerprint(other.public_key) for other in nodes if other.name == name} - {own}
        if rivals and not node.name:
            raise InvalidMessage(f"another SuperNode is registered as {name}, and this has no name")
        if rivals:
            raise InvalidMessage(
                f"several SuperNodes are registered as {name}, with the keys "
                f"{', '.join(sorted({own, *rivals}))}: unregister those that are not {name}'s "
                "(flwr supernode unregister)"
            )

    def remember(self, name: str, node: Any) -> str | None:
        """Remember a client's key, from the first time on that it joins.

        Returns:
            The fingerprint; None where no name was given when the key was registered, or no key
            was: such a key may be another the next time.
        """
        if node.name != name:
            return None
        own = fingerprint(node.public_key)
        if self._known.get(name) != own:
            self._known[name] = own
            with replacing(self._path) as file:
                file.write((json.dumps(self._known, indent=1) + "\n").encode())
        return own
