"""Which trainings a grid consists of, and what is made of their results."""

import subprocess
import sys

import pytest
from conftest import ROOT
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope

sys.path.insert(0, str(ROOT / 'tools'))
import method_specs
import run_grid
import summarize

from e3va_mm.methods import METHODS


def merged(method, dataset='shapes-seg'):
    """The backbone's config as ``tools/train.py`` gets it for a method."""
    config = Config.fromfile(ROOT / run_grid.DATASETS[dataset].format(method_specs.config_prefix(method) + 'swin-nano'))
    options = (option.split('=', 1) for option in method_specs.cfg_options(method))
    config.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in options})
    return config.model.backbone


def test_every_method_has_a_name():
    wrapped = {spec['method']['type'] for spec in method_specs.METHODS.values() if 'method' in spec}
    assert wrapped == set(METHODS) - {'Full', 'PEFT'}


@pytest.mark.parametrize('dataset', run_grid.DATASETS)
@pytest.mark.parametrize('prefix', ['', 'frozen-', 'e3va-'])
def test_every_data_set_has_its_configs(dataset, prefix):
    for backbone in run_grid.BACKBONES[: 1 if 'shapes' in dataset else None]:
        assert (ROOT / run_grid.DATASETS[dataset].format(prefix + backbone)).is_file()


def test_a_backbone_without_a_config(capfd):
    command = ['tools/run_grid.py', '--datasets', 'shapes-seg', '--backbones', 'vit-tiny', '--out', 'unused.json']
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    assert 'no config for this data set and backbone: configs/shapes/e3va-vit-tiny' in capfd.readouterr().err


def test_a_method_changes_the_config_it_starts_from():
    assert merged('full').type == 'SwinTransformer'
    assert merged('full+checkpointed').with_cp
    assert merged('frozen').method == dict(type='Frozen')
    assert merged('mona').method == dict(type='Mona')
    variant = merged('e3va+taps-float8+sampled+pca+mixing3')
    assert (variant.type, variant.saved_dtype, variant.saved_fraction) == ('E3VABackbone', 'float8_e4m3fn', 0.125)
    assert variant.adapter == dict(rank=8, branches=2, hidden_ratio=0.5, basis='pca', mixing=3)
    init_default_scope('mmseg')
    MODELS.build(variant)


@pytest.mark.parametrize('method', ['e4va', 'e3va+tap-float8', 'full+'])
def test_unknown_method(method):
    with pytest.raises(ValueError, match='methods are .*options'):
        method_specs.backbone_of(method)


def result(method, value, config='configs/shapes/swin-nano_upernet_1xb8-600_shapes-96x96.py'):
    parameters = {'highway': {'trainable': 7, 'frozen': 0}, 'head': {'trainable': 9, 'frozen': 0}}
    report = dict(metrics={'mIoU': value}, parameters=parameters, peak_memory_mib=100, step_seconds_median=0.5,
                  checkpoint_bytes=2**21, peak_memory_kind='cuda allocated')  # fmt: skip
    return dict(config=config, method=method, jobs=1, report=report)


def test_table_and_plot(tmp_path):
    runs = {
        f'{method} {value}': result(method, value) for method, value in (('e3va', 40), ('e3va', 42), ('frozen', 38))
    }
    lines = summarize.summarize({'runs': runs}).splitlines()
    assert lines[2].startswith('| shapes-96x96 | frozen | mIoU 38.0 | 1 | 7 |')
    assert lines[3] == '| shapes-96x96 | E³VA | mIoU 41.0 ± 1.4 | 2 | 7 | 100 MiB | 500 ms | 2 MiB |'
    summarize.draw({'runs': runs}, tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 5000


def test_contended_step_times_are_left_out():
    run = {**result('e3va', 40), 'jobs': 2}
    assert '| 100 MiB |  | 2 MiB |' in summarize.summarize({'runs': {'a': run}})


def test_other_backbones_have_rows_of_their_own():
    runs = {
        name: result('e3va', 40, f'configs/camvid/e3va-{name}_upernet_1xb8-1500_camvid-352x480.py')
        for name in run_grid.BACKBONES
    }
    rows = summarize.summarize({'runs': runs}).splitlines()[2:]
    assert [row.split('|')[1].strip() for row in rows] == ['camvid', 'camvid, vit-tiny', 'camvid, efficientnet-lite0']
