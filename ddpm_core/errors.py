"""The one exception that means: what the user gave is wrong, and here is the remedy."""


class InputError(ValueError):
    """The user's input is wrong. The message is one line that names the thing and the remedy.

    Command lines print it and exit with 2; the endpoint answers 4xx with it.
    """
