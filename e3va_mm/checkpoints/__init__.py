"""Everything that reads or writes weights."""

from . import files  # noqa: F401  (registers what reads safetensors and the embedded weights)
