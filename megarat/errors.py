"""What a user of megarat can do wrong, and the exit codes scripts rely on."""

from __future__ import annotations

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_HUNG = 70  # nothing went on for too long on this rank; its stacks are in RUN/stacks (sysexits' EX_SOFTWARE)
EXIT_STOPPED = 75  # stopped early on request, with a good checkpoint: "requeue me" (sysexits' EX_TEMPFAIL)


class UserError(Exception):
    """Bad input or configuration. The message names the file or key, what was found, and what would be right.

    The command line prints the message without a traceback and exits with code 2.
    """


class ToldByFirstRank(UserError):
    """The same on another rank than the first, which reports it for all: the command line exits with code 2 and says nothing."""


class StoppedEarly(Exception):
    """A run ended before its last pair because it was asked to; its checkpoint is complete (exit code 75)."""
