"""The one exception for a user's mistake.

Commands catch `UserError`, print its message as one sentence and exit with status 2; any other exception is a bug and
keeps its traceback.
"""


class UserError(ValueError):
    """Bad input: the message gives the values, the rule, and the key or option to change.

    Attributes:
        shared: every rank raises it together, so one of them may speak for all.
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared
