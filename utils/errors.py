"""The one exception that reaches a user as a sentence instead of a traceback."""


class UserError(Exception):
    """A fault the user can mend: bad flag, missing file, damaged data, wrong checkpoint.

    The message names the flag or file, what was found, and what is allowed. Main scripts print it
    on one line and exit with code 2 (see `utils.cli.run_main`).
    """
