"""The console commands ``e3va-train``, ``e3va-test``, …: each runs the tool of its name, as ``python tools/…`` does."""

import importlib.util
from functools import partial

from .named_configs import brought_by


def _run(tool: str) -> None:
    spec = importlib.util.spec_from_file_location(tool, brought_by('e3va_mm', 'tools') / f'{tool}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


train = partial(_run, 'train')
test = partial(_run, 'test')
infer = partial(_run, 'infer')
export = partial(_run, 'export')
merge = partial(_run, 'merge')
publish = partial(_run, 'publish_adapter')
