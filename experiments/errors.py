"""The one error that entry points turn into a single line and exit code 2."""


class UserError(Exception):
    """Bad input. The message is one line that names the field or file, the value, and the fix."""
