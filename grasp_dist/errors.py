"""The exceptions of the package; `InputError` is the one that the command line turns into a message."""

__all__ = ["FORCED_OUT", "PREEMPTED", "InputError", "NonFiniteError", "Preempted"]

PREEMPTED = 75
"""Exit code (EX_TEMPFAIL): a signal asked to stop, the state was saved on all ranks, and the same command goes on."""
FORCED_OUT = 76
"""Exit code: a signal asked to stop, and there was no time to save; the same command goes on from the last save."""


class InputError(ValueError):
    """Something that the user can mend: a wrong path, name, shape, or setting.

    The message is one paragraph that names the file or weight at fault and the remedy. The command line prints it
    and exits with code 2; library users can catch it as a `ValueError`.
    """


class NonFiniteError(ArithmeticError):
    """A gradient is NaN or infinite on some rank. Raised on all ranks alike, before anything was changed: a loop may
    catch it, zero the gradients, and go on with the next batch."""


class Preempted(Exception):
    """A signal asked to stop, and all ranks have saved the same step (or, between stages, had nothing to save)."""
