"""Sphinx settings; `make docs` builds the site with warnings as errors."""

import os
import re
import sys
from pathlib import Path

from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from e3va_mm import __version__  # noqa: E402

project = 'e3va_mm'
author = 'the e3va_mm contributors'
copyright = f'2026, {author}'
version = release = __version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.autosummary', 'sphinx.ext.napoleon']
exclude_patterns = ['_build', '_templates']
templates_path = ['_templates']
html_theme = 'furo'
html_title = f'e3va_mm {release}'

myst_heading_anchors = 4
# Links to repository files are checked below, and by tests/test_docs.py.
autodoc_default_options = {'ignore-module-all': True, 'show-inheritance': True}
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
autodoc_inherit_docstrings = False
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False

_log = logging.getLogger(__name__)
_OUTSIDE = re.compile(r'\[(?P<text>[^]]*)\]\(\.\./(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)')


def _repository() -> str:
    """Where files outside of docs/ are to be seen: beside the build, or in the repository that a host builds from."""
    url = os.environ.get('READTHEDOCS_GIT_CLONE_URL')
    if url is None:
        return ROOT.as_uri()
    return f'{url.removesuffix(".git")}/blob/{os.environ["READTHEDOCS_GIT_COMMIT_HASH"]}'


def _link_to_repository(app, page: str, source: list[str]) -> None:
    """Pages link to files of the repository by relative paths, which the site does not hold."""

    def link(match: re.Match) -> str:
        if not (ROOT / match['path']).exists():
            _log.warning('no such file: ../%s', match['path'], location=page)
        # As HTML, because Markdown has no links to local files.
        return f'<a href="{_repository()}/{match["path"]}{match["anchor"] or ""}">{match["text"]}</a>'

    source[0] = _OUTSIDE.sub(link, source[0])


def _skip_field(app, what: str, name: str, member, skip: bool, options) -> bool | None:
    """Leaves out what NamedTuple says of its fields: their comments, in the source, say more."""
    return True if str(getattr(member, '__doc__', '')).startswith('Alias for field number') else None


def setup(app) -> None:
    app.connect('source-read', _link_to_repository)
    app.connect('autodoc-skip-member', _skip_field)
