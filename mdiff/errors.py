"""The one exception a user is meant to see."""


class UserError(Exception):
    """Bad input: one line naming the field, the value and the fix.

    The command line prints the message without a traceback and exits with code 2. Raise it before
    anything is written, so that a mistake costs nothing but the time to read one line.

    Attributes:
      shared: in a job of several processes, all of them raise this: the first one says so for all.
    """

    shared = False
