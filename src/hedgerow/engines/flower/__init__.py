"""The Flower engine: the same rounds over real networks, or over Flower's simulation runtime.

Only this room knows Flower. `app` writes a Flower app for an experiment; `server` and `client` are
the app's components; `simulation` runs both on one machine or a Ray cluster.

    server   the round loop, on the SuperLink's machine; needs no model
    fleet    the SuperNodes as the round loop sees them
    client   what Flower starts at a site for each message; hands it to the site's worker
    worker   the process at a site that stays, and keeps the model in memory between rounds
    script   the same process where it is a script of the site's own, with a trainer of its own
    site     what a site does: checks entries, keeps its copy of the ledger, trains
    node     a site's own settings
    messages what travels between server and sites
    keys     which site each client is
"""

from __future__ import annotations

import sys
from pathlib import Path

BASE = "base.json"
"""The file of an app that says which base model its sites must have."""


def app_folder() -> Path:
    """The folder of the app whose component Flower has loaded into this process.

    Raises:
        RuntimeError: it is no app of hedgerow's.
    """
    # Flower puts the app's folder on the path, and does not otherwise say where it is.
    for folder in map(Path, sys.path):
        if (folder / BASE).is_file():
            return folder
    raise RuntimeError(f"the Flower app has no {BASE}: make it with hedgerow flower init")
