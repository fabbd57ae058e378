"""The pages' tables are what the committed scripts make of the committed results, which say where they come from."""

import itertools
import json
from pathlib import Path

import pytest
from mmengine.config import Config

from benchmarks.accuracy import group_runs
from benchmarks.grid import DATASETS
from benchmarks.held_out import ranked_rates
from benchmarks.methods import backbone_of, cfg_options, config_prefix
from benchmarks.pages import DETECTORS_RATE, PICKED, runs_of
from benchmarks.training import ROOT
from benchmarks.update_docs import RESULTS, replace_section, updated_pages
from e3va_mm.tune import find_config

FILES = sorted(RESULTS.glob('*.json'))
SMALL_SETS = ('camvid', 'bccd', 'nuclei')


def read(name: str) -> dict:
    return json.loads((RESULTS / f'{name}.json').read_text())


def test_tables_are_those_of_the_results():
    texts, failed = updated_pages()
    assert not failed
    for page, text in texts.items():
        assert (ROOT / page).read_text() == text, f'{page}: run benchmarks/update_docs.py'


def test_a_missing_section_is_named():
    assert replace_section('a\n<!-- t -->\nold\n<!-- end of t -->\nb', 't', 'new').split('\n')[2] == 'new'
    with pytest.raises(ValueError, match='<!-- other -->'):
        replace_section('<!-- t --><!-- end of t -->', 'other', 'new')


@pytest.mark.parametrize('path', FILES, ids=[path.stem for path in FILES])
def test_every_result_says_where_it_comes_from(path):
    content = json.loads(path.read_text())
    if {'settings', 'trials', 'rows'} & set(content):
        assert {'device', 'torch', 'commit', 'command'} <= set(content)
    for entry in {**content.get('runs', {}), **content.get('cases', {})}.values():
        assert {'device', 'torch', 'commit', 'command'} <= set(entry)
        backbone_of(entry['method'])
        config = entry['config']
        if '::' in config:
            assert find_config(config)
        else:
            paths = [*ROOT.glob('configs/*/*.py'), *ROOT.glob('benchmarks/configs/*.py')]
            assert Path(config).name in [path.name for path in paths]


def test_every_result_is_explained():
    text = (RESULTS / 'README.md').read_text()
    assert all(f'`{path.name}`' in text for path in FILES)


def test_the_small_sets_train_at_the_rates_that_held_out_images_chose():
    chosen = ranked_rates(read('rates'))
    for dataset, method in itertools.product(SMALL_SETS, ('frozen', 'e3va', 'full')):
        config = Config.fromfile(ROOT / DATASETS[dataset].format(config_prefix(method) + 'swin-nano'))
        assert config.optim_wrapper.optimizer.lr == chosen[dataset, method][0]


@pytest.mark.parametrize('dataset', SMALL_SETS)
def test_the_picked_variants_train_as_reported(dataset):
    (rate,) = {run['learning_rate'] for run in runs_of(group_runs(read('small_sets')), dataset, PICKED)}
    precision, *options = cfg_options(PICKED + (DETECTORS_RATE if dataset != 'camvid' else ''))
    assert precision == 'model.backbone.frozen_dtype=None'
    plain = Config.fromfile(ROOT / DATASETS[dataset].format('e3va-swin-nano'))
    changes = {key: int(value) for key, value in (option.split('=') for option in options)}
    plain.merge_from_dict({**changes, 'optim_wrapper.optimizer.lr': rate})
    picked = Config.fromfile(ROOT / DATASETS[dataset].format('e3va-graph1-swin-nano'))
    assert picked.to_dict() == plain.to_dict()
