"""The one exception for a user's mistake, and what no message, log line or file of ours holds.

Commands catch `UserError`, print its message as one sentence and exit with status 2; any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec

HIDDEN = "***"
# The user and password of a URL; a password may hold what should have been quoted ("/", "@", a blank).
_USER = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/?#@:]*:(?!\d+(?:[/?\s]|$))[^?#\n@]{0,200}@)")
_QUERY = re.compile(r"(://[^\s?#\"]*\?)([^\s\"]*?)(?=['),;:.]*(?:[\s\"]|$))")
_REFERENCE = re.compile(r"(?:[^:@=&]*[:=])?\$\{\w+\}")  # of a variable: user:${PASSWORD}, sig=${SIGNATURE}


def without_secrets(text: str) -> str:
    """`text` with user, password and query of every URL in it as `***`: https://***@host/data?***.

    References to environment variables, as in https://me:${PASSWORD}@host, are no secrets and stay.
    """
    text = _USER.sub(lambda found: _hidden([found[0][:-1]]) + "@", text)
    return _QUERY.sub(lambda found: found[1] + _hidden(found[2].split("&")), text)


def _hidden(pieces: list[str]) -> str:
    return "&".join(pieces) if all(_REFERENCE.fullmatch(piece) for piece in pieces) else HIDDEN


class UserError(ValueError):
    """Bad input: the message gives the values, the rule, and the key or option to change.

    The message has no secrets, whatever it was made of: see `without_secrets`.

    Attributes:
        shared: every rank raises it together, so one of them may speak for all.
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(without_secrets(message))
        self.shared = shared


# What the system says of a path that it was given, whoever asks.
_REFUSED = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}


def refused_path(error: OSError, words: Sequence[str]) -> UserError | None:
    """A sentence for a path of the command line, or what lies in it, that the system refused; None for other errors.

    Args:
        words: of the command line, also as `name=PATH`.
    """
    if error.errno not in _REFUSED or not isinstance(error.filename, str | bytes):
        return None
    path = os.path.abspath(os.fsdecode(error.filename))
    for word in filter(None, (*words, *(word.partition("=")[2] for word in words))):
        named = os.path.abspath(os.path.expanduser(word))
        if path == named or path.startswith(named.rstrip("/") + "/"):
            return UserError(f"{word} cannot be used: {error.strerror} ({path}); allow it or give another path")
    return None


def require_extra(extra: str, *modules: str, purpose: str) -> None:
    """Say what to install when one of `modules`, which the package's extra `extra` brings, cannot be found.

    Args:
        purpose: what needs them, the subject of the sentence: a command, or a sentence's beginning.

    Raises:
        UserError: one is missing; the message names the extra.
    """
    for module in modules:
        if not _is_installed(module):
            raise UserError(f"{purpose} needs {module}, which is not installed: pip install 'nextlat-dist[{extra}]'")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is missing; or a module without a spec, as a test's stand-in
        return False
