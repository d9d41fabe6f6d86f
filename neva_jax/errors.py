"""The two errors a person is meant to read. Every other exception is a defect of ours and keeps its traceback."""


class UserError(Exception):
    """Wrong input. One line: what was found, what was expected, what to change. `cli.run` prints it and exits with code 2."""


class DataError(UserError):
    """A defect of one record, picture or data file; the message names it. `on_bad_image: skip` counts those about pictures."""
