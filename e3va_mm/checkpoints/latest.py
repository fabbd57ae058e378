"""Which checkpoint a run goes on from."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

from mmengine.logging import print_log

from .errors import DamagedCheckpointError
from .files import read_checkpoint

# A file in the work dir; its time is when the last run that resumed nothing has begun there.
_STARTED = '.run_started'


def latest_checkpoint(work_dir: str | Path, folder: str | Path | None = None) -> Path | str | None:
    """The newest checkpoint that can be read, of the last run in ``work_dir``; None where it has none yet.

    That is what ``last_checkpoint`` in ``work_dir`` names, or else the newest of those that the run saved before it.

    Args:
        work_dir: of the run.
        folder: where its checkpoints are, if not in ``work_dir``.
    """
    pointer, started, folder = Path(work_dir, 'last_checkpoint'), Path(work_dir, _STARTED), Path(folder or work_dir)
    named = pointer.read_text().strip() if pointer.is_file() else ''
    if '://' in named:
        return named
    # Of a folder that was moved, the pointer still names the old place.
    exact = [path for path in (Path(named), folder / Path(named).name) if path.is_file()][:1]
    since = started.stat().st_mtime if started.is_file() else 0
    return next(filter(_is_readable, [*exact, *_numbered(folder, since, _step(Path(named)) or math.inf)]), None)


def mark_fresh_run(work_dir: str | Path) -> None:
    """From here on, what older runs left in ``work_dir`` is not what :func:`latest_checkpoint` looks for."""
    Path(work_dir, _STARTED).touch()
    Path(work_dir, 'last_checkpoint').unlink(missing_ok=True)


def _numbered(folder: Path, since: float, before: float) -> list[Path]:
    """The checkpoints with a number below ``before`` that were saved ``since`` (seconds, as files have it), newest
    first."""
    times = {path: path.stat().st_mtime for path in folder.glob('*.pth') if (_step(path) or math.inf) < before}
    newest_first = sorted(times, key=lambda path: (times[path], _step(path)), reverse=True)
    return [path for path in newest_first if times[path] >= since]


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
