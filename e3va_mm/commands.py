"""The console commands ``e3va-train``, ``e3va-test``, …: each runs the tool of its name, as ``python tools/…`` does."""

import runpy
from functools import partial

from .named_configs import brought_by


def _run(tool: str) -> None:
    runpy.run_path(str(brought_by('e3va_mm', 'tools') / tool), run_name='__main__')


train = partial(_run, 'train.py')
test = partial(_run, 'test.py')
infer = partial(_run, 'infer.py')
merge = partial(_run, 'merge.py')
publish = partial(_run, 'publish_adapter.py')
