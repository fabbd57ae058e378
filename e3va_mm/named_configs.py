"""Configs by their names in a toolbox, ``mmdet::…``, or in this package, ``e3va_mm::…``: installed or from a clone."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from mmengine.config import Config

_HERE = f'{__package__}::'
_stock_path = Config._get_cfg_path


def find_config(name: str | Path) -> Path:
    """The file of a config that is named by its path, or as ``toolbox::path``, with or without ``.py``.

    Raises:
        FileNotFoundError: the toolbox or the file is missing; names similar ones.
    """
    toolbox, separator, path = str(name).rpartition('::')
    folder = configs_of(toolbox) if separator else Path()
    found = [file for file in (folder / path, folder / f'{path}.py') if file.is_file()]
    if found:
        return found[0]
    known = [str(file.relative_to(folder)) for file in folder.rglob('*.py')] if separator else []
    similar = difflib.get_close_matches(path, known, 3)
    raise FileNotFoundError(f'config {name} does not exist' + (f'; similar are {similar}' if similar else ''))


def configs_of(toolbox: str) -> Path:
    """The folder of the configs that a toolbox, or this package, brings."""
    return brought_by(toolbox, 'configs')


def brought_by(package: str, folder: str) -> Path:
    """A folder of a package's repository, which a wheel has in ``.mim``, and a clone beside the package.

    Raises:
        FileNotFoundError: the package is not installed, or brings no such folder.
    """
    spec = importlib.util.find_spec(package)
    root = Path(spec.origin).parent if spec and spec.origin else None
    for found in (root / '.mim' / folder, root.parent / folder) if root else ():
        if found.is_dir():
            return found
    raise FileNotFoundError(f'{package}:: names no installed toolbox with configs and tools')


def resolve_own_configs() -> None:
    """Lets ``_base_ = 'e3va_mm::…'`` name a config of this package.

    mmengine takes such names for a fixed list of packages alone, and for wheels. It would also look up, in the scope of
    the name, what a base's variables stand for; but the configs here are of the toolbox that they derive from.
    """
    Config._get_cfg_path = staticmethod(_config_path)


def _config_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
    """The file of a base and its scope; None: that of the config that derives from it."""
    return (str(find_config(cfg_path)), None) if cfg_path.startswith(_HERE) else _stock_path(cfg_path, filename)
