"""Which checkpoint a run goes on from."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mmengine.logging import print_log

from .errors import DamagedCheckpointError
from .files import read_checkpoint

# What `last_checkpoint` names until a run has saved its first one.
_NONE_YET = 'no_checkpoint_yet'


def latest_checkpoint(work_dir: str | Path, folder: str | Path | None = None) -> Path | str | None:
    """The newest checkpoint that can be read, of the last run in ``work_dir``; None where it has none yet.

    That is what ``last_checkpoint`` in ``work_dir`` names, or else the newest of those that the run saved before it.

    Args:
        work_dir: of the run.
        folder: where its checkpoints are, if not in ``work_dir``.
    """
    pointer, folder = Path(work_dir, 'last_checkpoint'), Path(folder or work_dir)
    named = pointer.read_text().strip() if pointer.is_file() else ''
    if '://' in named:
        return named
    # Of a folder that was moved, the pointer still names the old place.
    exact = [path for path in (Path(named), folder / Path(named).name) if path.is_file()][:1]
    return next(filter(_is_readable, [*exact, *_saved_before(pointer, named, folder)]), None)


def mark_fresh_run(work_dir: str | Path) -> None:
    """From here on, what older runs left in ``work_dir`` is not what :func:`latest_checkpoint` looks for."""
    Path(work_dir, 'last_checkpoint').write_text(_NONE_YET)


def _saved_before(pointer: Path, named: str, folder: Path) -> list[Path]:
    """Numbered checkpoints, newest first, without those that can only be an older run's."""
    steps = {path: step for path in folder.glob('*.pth') if (step := _step(path)) is not None}
    if named == _NONE_YET:
        # A run may die between its first checkpoint and the note of it.
        steps = {path: step for path, step in steps.items() if path.stat().st_mtime >= pointer.stat().st_mtime}
    elif (last := _step(Path(named))) is not None:
        steps = {path: step for path, step in steps.items() if step < last}
    return sorted(steps, key=lambda path: (path.stat().st_mtime, steps[path]), reverse=True)


def _is_readable(path: Path) -> bool:
    try:
        read_checkpoint(path)
        return True
    except DamagedCheckpointError as error:
        print_log(f'{error}; trying the one before', logger='current', level=logging.WARNING)
        return False


def _step(path: Path) -> int | None:
    match = re.fullmatch(r'(?:iter|epoch)_(\d+)', path.stem)
    return int(match[1]) if match else None
