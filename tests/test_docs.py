"""What pages link to exists, their configs build, and the messages that they explain are those of the code."""

import re
from pathlib import Path

import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from e3va_mm.optim import ADAMW_SHARE
from e3va_mm.tune import find_config, tune

PAGES = sorted(
    path
    for pattern in ('*.md', 'docs/*.md', 'configs/*/README.md', 'benchmarks/*.md', 'e3va_mm/**/*.md')
    for path in ROOT.glob(pattern)
)
FENCED = re.compile(r'^```.*?^```$', re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as code hosts make them."""
    headings = re.findall(r'^#+ (.*)$', FENCED.sub('', path.read_text()), re.MULTILINE)
    plain = (re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading) for heading in headings)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in plain}


@pytest.mark.parametrize('page', PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)\s]+)\)', FENCED.sub('', page.read_text()))
    for link in (link for link in links if '://' not in link):
        target, _, anchor = link.partition('#')
        path = page.parent / target if target else page
        assert path.exists(), f'{page}: {link}'
        assert not anchor or anchor in anchors(path), f'{page}: {link}'


def test_every_page_is_in_the_navigation():
    index = (ROOT / 'docs/index.md').read_text()
    pages = {path.stem for path in (ROOT / 'docs').glob('*.md')} - {'index'}
    assert pages == {line for line in index.splitlines() if line in pages}


def python_blocks(page: str) -> list[str]:
    return re.findall(r'^```python\n(.*?)^```$', (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


CONFIGS = [block for block in python_blocks('docs/your_config.md') if '_base_' in block]


@pytest.mark.parametrize('number', range(len(CONFIGS)))
def test_configs_on_the_pages_build(number, tmp_path):
    """Their backbones, in full size, and the optimizer's groups: the highway's rate, which is what the page says."""
    (tmp_path / 'mine.py').write_text(CONFIGS[number])
    config = Config.fromfile(tmp_path / 'mine.py')
    config = config if config.model.backbone.type == 'E3VABackbone' else tune(config)
    init_default_scope(config.default_scope)
    model = nn.Module()
    model.backbone = MODELS.build(config.model.backbone)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    highway = {id(parameter) for parameter in model.backbone.highway.parameters()}
    rates = {group['lr'] for group in optimizer.param_groups for each in group['params'] if id(each) in highway}
    given = config.optim_wrapper.optimizer
    base = given.lr * (ADAMW_SHARE if given.type == 'SGD' else 1)
    assert max(rates) == pytest.approx(min(10 * base, 0.005) if config.model.backbone.get('mixer') else base)


NAMES = {name for page in PAGES for name in re.findall(r'(?:mmdet|mmseg|e3va_mm)::\w+/[\w./-]+', page.read_text())}


@pytest.mark.parametrize('name', sorted(NAMES))
def test_configs_that_the_pages_name_are_there(name):
    assert find_config(name).is_file()


def explained_messages() -> list[str]:
    rows = re.findall(r'^\| (`.*?) \|', (ROOT / 'docs/troubleshooting.md').read_text(), re.MULTILINE)
    return [re.search('`(.*?)`', row)[1] for row in rows]


def test_explained_messages_are_those_of_the_code():
    code = '\n'.join(path.read_text() for folder in ('e3va_mm', 'tools') for path in (ROOT / folder).rglob('*.py'))
    unknown = [message for message in explained_messages() if message not in code]
    assert not unknown and len(explained_messages()) > 40
