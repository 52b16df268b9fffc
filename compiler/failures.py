# SPDX-License-Identifier: Apache-2.0
"""Every failure of a command as one line on standard error and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings

import click

from schedules.errors import KerfError

EXIT_USER, EXIT_BUG, EXIT_INTERRUPTED = 2, 4, 130


class KerfGroup(click.Group):
    """A command group that turns every failure into one line on standard error and an exit code."""

    def main(self, args=None, prog_name=None, standalone_mode=True, **extra):
        args = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in args
        args = [a for a in args if a != "--debug"] or ["--help"]
        if not debug:
            warnings.simplefilter("ignore")  # those of the libraries below; ours are in the report
        interrupts = Interrupts()
        try:
            with interrupts:
                name = prog_name or "compile-model"
                code = super().main(args, name, standalone_mode=False, **extra)
        except BaseException as error:
            if interrupts.seen and not isinstance(error, (SystemExit, click.exceptions.Exit)):
                error = KeyboardInterrupt()
            code, line = describe_failure(error)
            if code is None:
                raise
            if debug:
                traceback.print_exc()
            if line:
                click.echo(line, err=True)
        sys.exit(code if isinstance(code, int) else 0)


class Interrupts:
    """Remembers Ctrl-C within the block: an interrupt inside a callback of TVM's, and most of a
    build is one, arrives as an empty RuntimeError."""

    def __init__(self):
        self.seen = False

    def __enter__(self) -> Interrupts:
        self._previous = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, *_) -> None:
        self.seen = True
        # Objects that were being made complain when they are taken down: the process ends now.
        sys.unraisablehook = lambda _unraisable: None
        raise KeyboardInterrupt


def describe_failure(error: BaseException) -> tuple[int | None, str]:
    """Exit code and the one line to show; code None for what must pass through."""
    if isinstance(error, KerfError):
        return error.exit_code, f"compile-model: {_one_line(error)}"
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return EXIT_INTERRUPTED, "compile-model: interrupted; nothing half-written"
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code, ""
    if isinstance(error, click.ClickException):
        command = getattr(getattr(error, "ctx", None), "command_path", "compile-model")
        return EXIT_USER, f"{command}: {_one_line(error.format_message())} (see {command} --help)"
    if isinstance(error, BrokenPipeError):
        # The reader of our output went away; keep Python from failing again when it flushes at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else _one_line(error)
        return EXIT_USER, f"compile-model: {what}"
    if isinstance(error, MemoryError):
        return EXIT_USER, "compile-model: out of memory"
    if isinstance(error, Exception):
        what = f"{type(error).__name__}: {_one_line(error)}"
        again = "" if "--debug" in sys.argv else " (--debug shows where)"
        return EXIT_BUG, f"compile-model: this is a bug in Kerf: {what}{again}"
    return None, ""


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
