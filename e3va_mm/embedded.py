"""The checkpoint scheme ``e3va://`` for weights that ship inside the package."""

from pathlib import Path

from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_from_local

WEIGHTS = Path(__file__).parent / 'weights'


@CheckpointLoader.register_scheme(prefixes='e3va://')
def load_from_e3va(filename: str, map_location=None) -> dict:
    """Loads ``e3va://NAME`` from the package, whatever the working directory."""
    return load_from_local(str(WEIGHTS / filename.removeprefix('e3va://')), map_location)
