"""What a method or a run is handed where nothing comes of it."""

from hedgerow.testing.doubles import Forgetful, Nobody, no_past

__all__ = ["Forgetful", "Nobody", "no_past"]
