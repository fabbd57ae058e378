"""What the pages say of memory and time is what the result files say."""

from conftest import ROOT, page
from summarize_benchmark import load_rows
from update_docs import OVERVIEW_MODELS, costs_of_plain, steps_of


def performance(name: str) -> tuple[str, list[dict]]:
    """The text of docs/performance.md, and the rows of a benchmark."""
    return page('docs/performance.md'), load_rows(ROOT / f'results/{name}.json')


def test_averages_over_the_tasks():
    text, rows = performance('benchmark_gpu')
    plain = {(row['model'], row['method']): row for row in rows if (row['batch_size'], row['precision']) == (8, 'fp32')}

    def saved(method, key):
        shares = [1 - plain[model, method][key] / plain[model, 'full'][key] for model in OVERVIEW_MODELS]
        return f'{100 * sum(shares) / len(shares):.1f}'

    methods = ('e3va+bf16+taps-float8', 'e3va+bf16+taps-float8+sampled', 'frozen', 'full+checkpointed')
    memory = [saved(method, 'peak_memory_mib') for method in methods]
    assert (
        '{} % less with `bf16+taps-float8`, {} with `sampled`, {} with a frozen backbone, {} with'.format(*memory)
        in text
    )
    time = [saved(m, key) for key in ('step_seconds', 'kernel_seconds') for m in ('e3va+bf16', 'frozen')]
    assert '{} % less than full (frozen {} %)'.format(*time[:2]) in text
    assert '{} % less (frozen {} %)'.format(*time[2:]) in text


def test_memory_caps():
    text, rows = performance('benchmark_gpu')
    capped = {
        (row['memory_cap'], row['precision']): row
        for row in rows
        if 'taps-float8' in row['method'] and row['memory_cap']
    }
    for cap in (3, 4.5):
        peak = capped[cap, 'amp-fp16']['peak_memory_mib'] / 1024
        assert peak < cap and f'({peak:.2f} GiB' in text and not capped[cap, 'fp32']['batch_size']


def test_ratios_of_dinov2():
    text, rows = performance('benchmark_dinov2')
    ratios = {'peak_memory_mib': [], 'step_seconds': []}
    vits = {(row['model'], row['image_size'][0], row['method']): row for row in rows}
    for model, size, method in vits:
        if method == 'e3va+bf16':
            for key, values in ratios.items():
                values.append(f'{vits[model, size, method][key] / vits[model, size, "frozen"][key]:.2f}')
    assert (
        "takes {} and {} of frozen's memory for DINOv2-L at 512² and 896², and {} and {} for".format(
            *ratios['peak_memory_mib']
        )
        in text
    )
    assert 'of its time {}, {}, {} and {}.'.format(*ratios['step_seconds']) in text


def test_what_mixers_cost():
    text, rows = performance('benchmark_cpu_mixer')
    by_method = {row['method']: row for row in rows}
    plain, others = by_method['e3va'], [row for method, row in by_method.items() if method.startswith('e3va+')]
    assert len(others) == 7
    memory, time = (
        sorted(f'{row[key] / plain[key]:.2f}' for row in others) for key in ('peak_memory_mib', 'step_seconds')
    )
    assert f"{memory[0]} to {memory[-1]} of E³VA's memory" in text
    assert max(others, key=lambda row: row['step_seconds'])['method'].endswith('graph1')
    assert f'{time[0]} to {time[-2]} of its time ({time[-1]} with the last stage in the graph)' in text


def test_what_mixers_cost_on_a_gpu():
    text, rows = performance('benchmark_mixers')
    costs = costs_of_plain(ROOT / 'results/benchmark_mixers.json')
    mixers = {key: of for key, of in costs.items() if 'mixer' in key[1] and 'kept' not in key[1]}
    assert {f'{of.memory:.2f}' for of in mixers.values()} == {'0.99', '1.00'}
    times = [of.kernel_time for of in mixers.values()]
    assert f"is {min(times):.2f} to {max(times):.2f} of E³VA's" in text
    times = [of.kernel_time for (_, method), of in mixers.items() if method.endswith('rank4+mixer96')]
    assert f"`rank4+mixer96` takes {min(times):.2f} to {max(times):.2f} of the kernels' time" in text
    times = [of.kernel_time for (_, method), of in mixers.items() if method.endswith('graph1')]
    assert f"in place of the stage's taps, it is {min(times):.2f} to {max(times):.2f}." in text
    kept = {key: of for key, of in costs.items() if 'kept' in key[1]}
    memory = [of.memory for of in kept.values()]
    graph = [[of.kernel_time for (_, m), of in costs.items() if m.endswith(end)] for end in ('graph1+kept', 'graph1')]
    bounds = [bound for values in (memory, *graph) for bound in (min(values), max(values))]
    claim = "for {:.2f} to {:.2f} of E³VA's memory the kernels take {:.2f} to {:.2f} of its time"
    claim += ' in place of {:.2f} to {:.2f}'
    assert claim.format(*bounds) in text
    plain = [row for row in rows if row['method'] in ('e3va', 'e3va+bf16') and row['model'] != 'retinanet swin-l']
    waits = (f'{row["step_seconds"] / row["kernel_seconds"]:.1f}' for row in plain)
    assert 'with E³VA {} times as long with Swin-L, {} on CamVid, {} and {} with the detectors'.format(*waits) in text


def test_steps_in_turn():
    steps = {key: row['of_first'] for key, row in steps_of(ROOT / 'results/steps.json').items()}

    def span(method):
        values = [steps[dataset, method] for dataset in ('camvid', 'bccd', 'nuclei')]
        return f'{min(values):.2f} to {max(values):.2f}'

    text, readme, picked = page('docs/performance.md'), page('README.md'), 'e3va+rank4+mixer96+graph1'
    assert f"A step takes {span(picked)} of E³VA's time (Mona {span('mona')})" in readme
    assert f"for {span('e3va+rank4+mixer96')} of E³VA's step" in readme
    kernels = costs_of_plain(ROOT / 'results/benchmark_mixers.json')
    (kernel_time,) = (of.kernel_time for (model, m), of in kernels.items() if 'camvid' in model and m == picked)
    assert f"`graph1` takes {steps['camvid', picked]:.2f} of E³VA's, its kernels {kernel_time:.2f}" in text
    variants = [method for dataset, method in steps if dataset == 'camvid' and method.startswith('e3va')]
    assert max(variants, key=lambda method: steps['camvid', method]) == 'e3va+rank4+mixer96+every2'


def test_how_far_processes_differ():
    text, rows = performance('benchmark_mixers')

    def apart(row, seconds):
        values = [seconds(run) for run in row['runs']]
        return max(values) / min(values)

    steps = max(apart(row, lambda run: run['step_seconds']) for row in rows)
    assert f'by up to {steps:.1f} times from process to process' in text
    assert max(apart(row, lambda run: run['most_time'][0]['seconds']) for row in rows) < 1.02
    assert 'the same to two hundredths in all processes' in text


def test_time_of_the_optimizer():
    def optimizer(name, method):
        rows = [r for r in performance(name)[1] if r['model'].startswith('retinanet') and r['method'] == method]
        return f'{1000 * rows[0]["runs"][0]["phases"]["optimizer"]["seconds"]:.0f}'

    stock, merged = (
        [optimizer(name, method) for method in ('e3va', 'mona')]
        for name in ('benchmark_groups', 'benchmark_small_sets_before')
    )
    text = page('README.md')
    assert '{} ms for E³VA and {} for Mona, merged {} and {}'.format(*stock, *merged) in text
