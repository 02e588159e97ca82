"""The exceptions of the package; `InputError` is the one that the command line turns into a message."""

__all__ = ["InputError", "NonFiniteError"]


class InputError(ValueError):
    """Something that the user can mend: a wrong path, name, shape, or setting.

    The message is one paragraph that names the file or weight at fault and the remedy. The command line prints it
    and exits with code 2; library users can catch it as a `ValueError`.
    """


class NonFiniteError(ArithmeticError):
    """A gradient is NaN or infinite on some rank. Raised on all ranks alike, before anything was changed: a loop may
    catch it, zero the gradients, and go on with the next batch."""
