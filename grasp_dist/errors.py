"""The one exception that the command line turns into a message instead of a traceback."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Something that the user can mend: a wrong path, name, shape, or setting.

    The message is one paragraph that names the file or weight at fault and the remedy. The command line prints it
    and exits with code 2; library users can catch it as a `ValueError`.
    """
