"""The one exception for a user's mistake.

Commands catch `UserError`, print its message as one sentence and exit with status 2; any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

from importlib.util import find_spec


class UserError(ValueError):
    """Bad input: the message gives the values, the rule, and the key or option to change.

    Attributes:
        shared: every rank raises it together, so one of them may speak for all.
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


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
