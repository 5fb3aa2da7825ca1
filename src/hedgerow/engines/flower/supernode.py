"""A SuperNode that ends with the process that started it, however that ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hedgerow.errors import UserError


@contextlib.contextmanager
def supernode(
    name: str, place: Path, options: Sequence[str], when_over: Callable[[], None]
) -> Iterator[subprocess.Popen[bytes]]:
    """A SuperNode, until the block ends.

    Args:
        name: the client's.
        place: the site's folder.
        options: of `flower-supernode`, as `["--superlink", "fleet.example:8443"]`.
        when_over: called, in another thread, when it has ended.

    Raises:
        UserError: Flower is not installed.
    """
    beside = Path(sys.executable).parent  # Flower finds its own programs by PATH
    path = os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)])
    program = shutil.which("flower-supernode", path=path)
    if program is None:
        raise UserError("flower-supernode is not in PATH: install hedgerow[flower]")
    with socket.socket() as probe:  # for its own processes; two on one machine need two
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = ["--port", str(port), "--node-config", f'name="{name}" folder="{place}"']
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, program, *options, *own],
        stdin=subprocess.PIPE,  # which is closed with this process
        env=os.environ | {"PATH": path},
        start_new_session=True,
    )

    def wait() -> None:
        process.wait()
        when_over()

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield process
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            # Closing alone says nothing where another process has inherited this end.
            process.stdin.write(b".")
            process.stdin.close()
        process.wait()


def _guard(command: Sequence[str]) -> int:
    """Run a command until something stands in standard input, or that is closed.

    Returns:
        The command's exit status.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end() -> None:
        os.read(0, 1)  # not by sys.stdin, whose lock would be held at this process's end
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()

    threading.Thread(target=end, daemon=True).start()
    return process.wait()


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))
