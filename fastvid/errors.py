"""Errors that a user can mend. Each carries one line: what was wanted, what came, what to do."""


class FastvidError(ValueError):
    """Base of every error that fastvid raises on purpose; the command line prints it as one line."""


class UsageError(FastvidError):
    """An argument that cannot be used: out of range, unknown name, contradicting another."""


class VideoError(FastvidError):
    """A video file that is missing, unreadable, too short or cannot be written."""


class DataError(FastvidError):
    """A data set that cannot be opened or made."""


class CheckpointError(FastvidError):
    """A model or training folder that is missing, damaged or of another kind."""


class WeightsError(FastvidError):
    """Published weights that are missing, damaged, not recognised or refused."""


class BackendError(FastvidError, NotImplementedError):
    """No backend that was asked for serves an op's arguments; says why each does not."""
