"""Engines: where clients train. `local` is this process."""
