"""The pages' tables are what the committed scripts make of the committed results, which say where they come from."""

import pytest
from conftest import ROOT, result_file
from update_docs import replace_section, updated_pages


def test_tables_are_those_of_the_results():
    for page, text in updated_pages().items():
        assert (ROOT / page).read_text() == text, f'{page}: run tools/update_docs.py'


def test_a_missing_section_is_named():
    assert replace_section('a\n<!-- t -->\nold\n<!-- end of t -->\nb', 't', 'new').split('\n')[2] == 'new'
    with pytest.raises(ValueError, match='<!-- other -->'):
        replace_section('<!-- t --><!-- end of t -->', 'other', 'new')


@pytest.mark.parametrize('name', ['small_sets', 'guard', 'rates', 'backbones', 'shapes_methods_cpu'])
def test_every_result_says_where_it_comes_from(name):
    content = result_file(name)
    for run in content['runs'].values():
        assert {'device', 'torch', 'commit', 'command', 'seed', 'train_args'} <= set(run)
        assert (ROOT / run['config']).is_file()


@pytest.mark.parametrize('name', ['segmentation.png', 'detection.png', 'bars.png'])
def test_pictures_in_the_readme_exist(name):
    assert f'docs/images/{name}' in (ROOT / 'README.md').read_text()
    assert (ROOT / 'docs/images' / name).stat().st_size > 1000
