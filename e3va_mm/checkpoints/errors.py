"""What is raised about files of weights."""


class CheckpointMismatchError(RuntimeError):
    """A checkpoint does not fit the model: keys, shapes or the frozen base differ."""


class DamagedCheckpointError(RuntimeError):
    """A checkpoint file is truncated, not a checkpoint, or would run code when loaded."""
