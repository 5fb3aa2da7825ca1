"""The entry point: mistakes become one sentence and an exit code."""

from __future__ import annotations

import contextlib
import errno
import sys
from pathlib import Path

from hedgerow.cli.frame import app
from hedgerow.environment import quieten
from hedgerow.errors import RunFailed, UserError
from hedgerow.lazy import safetensors

# Each registers its commands with `app`, in the order in which --help lists them.
# isort: off
import hedgerow.cli.run
import hedgerow.cli.show
import hedgerow.cli.evaluate
import hedgerow.cli.mt_bench
import hedgerow.cli.ledger
import hedgerow.cli.flower
import hedgerow.cli.catalogue  # noqa: F401
# isort: on


def main() -> None:
    """The entry point: mistakes become one sentence and an exit code."""
    quieten()
    _find_modules_beside_the_user()
    try:
        app()
    except UserError as error:
        _stop(str(error), 2)
    except RunFailed as error:
        _stop(str(error), 1)
    except KeyboardInterrupt:
        _stop("interrupted; what is written is valid, and a run goes on with --resume", 130)
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        _stop(f"{error.filename or 'the output'}: {error.strerror}; {_MENDABLE[error.errno]}", 2)
    except safetensors.SafetensorError as error:
        # safetensors wraps what the system says when it cannot write.
        _stop(f"the output could not be written: {error}", 2)


_MENDABLE = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT), "make room, then try again (a run goes on with --resume)"
) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    "name a place that you may write to",
)
_MENDABLE[errno.EFBIG] = "raise the limit on file sizes (a run goes on with --resume)"


def _find_modules_beside_the_user() -> None:
    """Have a method named `module:Class` found in the working directory, after all else."""
    with contextlib.suppress(FileNotFoundError):  # someone has removed it
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)


def _stop(sentence: str, code: int) -> None:
    print(f"hedgerow: {sentence}", file=sys.stderr)
    sys.exit(code)
