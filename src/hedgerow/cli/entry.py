"""The entry point: mistakes become one sentence and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import typer

from hedgerow.cli.frame import advisers, app
from hedgerow.environment import quieten
from hedgerow.errors import RunFailed, UserError
from hedgerow.files import expanded
from hedgerow.lazy import safetensors
from hedgerow.terminal import printable, say

# Each registers its commands with `app`, in the order in which --help lists them.
# isort: off
import hedgerow.cli.run
import hedgerow.cli.show
import hedgerow.cli.evaluate
import hedgerow.cli.audit
import hedgerow.cli.mt_bench
import hedgerow.cli.ledger
import hedgerow.cli.flower
import hedgerow.cli.catalogue
import hedgerow.cli.doctor  # noqa: F401
# isort: on


def main() -> None:
    """The entry point: mistakes become one sentence and an exit code."""
    quieten()
    _find_modules_beside_the_user()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where the encoding is ASCII, say
    with _stopped_by_signals() as signals:
        try:
            _run(_typed(sys.argv[1:]))
            sys.stdout.flush()
        except UserError as error:
            _stop(str(error), 2)
        except RunFailed as error:
            _stop(str(error), 1)
        except KeyboardInterrupt as stop:
            _end_at_once_from_now_on()
            # What a command has to say of how it goes on is the interrupt's own text.
            _stop(": ".join(["interrupted", *map(str, stop.args)]), 128 + signals[-1])
        except BrokenPipeError:
            # Who was to read this has ended, as `head` does; nor can what is left be flushed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            if error.filename is None and error.errno not in _ADVICE:
                raise
            advice = _ADVICE.get(error.errno or 0, "name another place")
            _stop(f"{error.filename or 'the output'}: {error.strerror}; {advice}", 2)
        except safetensors.SafetensorError as error:
            # safetensors wraps what the system says when it cannot write.
            _stop(f"the output could not be written: {error}", 2)
        except Exception as error:
            is_interrupted = len(signals) > 1
            if not is_interrupted or not _is_of_an_import(error):
                raise
            # Whoever is imported late may make another error of an interrupt, as in `cli.main`.
            _end_at_once_from_now_on()
            _stop("interrupted", 128 + signals[-1])


def _is_of_an_import(error: Exception) -> bool:
    """Whether an error was raised while a module was imported."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code.co_name == "<module>" for frame in frames)


def _run(arguments: list[str]) -> None:
    """Run a command; not by typer's own `main`, which says nothing of interrupts."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("hedgerow", arguments) as context:
            command.invoke(context)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        say(shown.getvalue().rstrip("\n"))
        sys.exit(error.exit_code)


def _typed(arguments: Sequence[str]) -> list[str]:
    """What was typed, with `~` expanded also where the shell leaves it, as in `--out=~/run`.

    Raises:
        UserError: an argument or an option's value is empty, as a variable is that is not set.
    """
    typed = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not argument or (equals and option.startswith("--") and not value):
            raise UserError(
                f"{option or 'an argument'} is empty: give it a value, or leave it out (a variable "
                "of the shell may not be set)"
            )
        if argument.startswith("~"):
            argument = expanded(argument)
        elif option.startswith("--") and value.startswith("~"):
            argument = f"{option}={expanded(value)}"
        typed.append(argument)
    return typed


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """Have SIGTERM end what runs as Ctrl-C does; yields the signals, of which the last counts.

    The first ends it as an exception does, so that what is open is closed; a second, whatever the
    first is waiting for, at once.
    """
    advisers.clear()  # of a command before, in this process
    signals: list[int] = [signal.SIGINT]

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        if len(signals) == 2:
            raise KeyboardInterrupt
        if len(signals) > 3:
            return  # the second is about to end the process
        try:
            advice = filter(None, [each() for each in advisers])
            sentence = printable(": ".join(["interrupted", *advice]))
            shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which bars hide
            os.write(sys.stderr.fileno(), f"{shown}hedgerow: {sentence}\n".encode(errors="replace"))
        finally:  # whatever becomes of the last words
            os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as in the background of a shell
            signal.signal(number, interrupt)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:
                signal.signal(number, handler)


def _end_at_once_from_now_on() -> None:
    """Have a further Ctrl-C end this process, which is about to end, without a word."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


_ADVICE = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT), "make room, then try again (a run goes on with --resume)"
) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    "name a place that you may write to",
)
_ADVICE[errno.EFBIG] = "raise the limit on file sizes (a run goes on with --resume)"
_ADVICE[errno.ENAMETOOLONG] = "give a shorter one"


def _find_modules_beside_the_user() -> None:
    """Have a method named `module:Class` found in the working directory, after all else."""
    with contextlib.suppress(FileNotFoundError):  # someone has removed it
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)


def _stop(sentence: str, code: int) -> None:
    say(f"hedgerow: {sentence}")
    sys.exit(code)
