"""The one exception that means: what the user gave is wrong, and here is the remedy."""

import re


class InputError(ValueError):
    """The user's input is wrong. The message is one line that names the thing and the remedy.

    Command lines print it and exit with 2; the endpoint answers 4xx with it.
    """

    def __str__(self) -> str:
        """One line, whatever the names in it hold."""
        return printable(super().__str__())


def reason(error: InputError, *names: str) -> str:
    """What is wrong, without the name of what it is wrong with: the same for all that have it."""
    text = str(error)
    for name in names:
        text = text.removeprefix(printable(name))
    return text.removeprefix(":").strip()


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` on one line that every terminal and file takes: control characters are escaped, and bytes of a file's name
    that are no UTF-8, which Python holds as U+DC80 to U+DCFF."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else match[0].encode("unicode_escape").decode()
