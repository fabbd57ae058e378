"""Packaging; see README.md for the ways to install."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = next(
    line.split("'")[1]
    for line in (ROOT / 'e3va_mm/__init__.py').read_text().splitlines()
    if line.startswith('__version__')
)
# The OpenMMLab packages exist under two names each (onedl-mmcv and mmcv, ...), and either serves. A plain install
# therefore requires neither, nor torch: it must not replace what a user already has. The extras choose.
ENGINE = ['torch>=2.4', 'onedl-mmengine>=0.10.8', 'onedl-mmcv>=2.3']
SEG = [*ENGINE, 'onedl-mmsegmentation>=1.4', 'ftfy']
DET = [*ENGINE, 'onedl-mmdetection>=3.5']
PEFT = ['peft>=0.15']
TIMM = ['timm>=1.0.20', 'torchvision']
QUANT = ['torchao>=0.18']  # which wants torch 2.11
ONNX = ['onnx', 'onnxscript>=0.5', 'onnxruntime']
PRETRAIN = ['onedl-mmpretrain>=1.3']
ROTATE = [*DET, 'onedl-mmrotate>=1.2']
TEST = ['ipykernel', 'nbclient', 'pytest', 'pytest-cov', 'pytest-xdist', 'pyyaml', 'ruff']

# What an installed package has of the clone, in the folder where OpenMMLab's programs look for it.
MIM = ['model-index.yml', 'configs/*/metafile.yml', 'configs/**/*.py']
MIM += [f'tools/{name}.py' for name in ('train', 'test', 'infer', 'export', 'merge', 'publish_adapter')]
MIM += ['tools/dist_*.sh', 'tools/slurm_*.sh']
# mim 0.5 takes the first line of the list of installed files for the package. The console commands are in ../../../bin,
# and so a name that sorts before the dot has to come first: pip sorts.
MIM_FOLDERS = ('e3va_mm/.mim', '+e3va_mm/.mim')
COMMANDS = ('train', 'test', 'infer', 'export', 'merge', 'publish')


class BuildWithMim(build_py):
    """Copies configs and tools into the package that is built; an editable one takes them from its clone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for target in (Path(self.build_lib, folder) for folder in MIM_FOLDERS):
            shutil.rmtree(target, ignore_errors=True)  # An earlier build may have left what is gone since.
            for file in (file for pattern in MIM for file in ROOT.glob(pattern)):
                copy = target / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)


setup(
    name='e3va_mm',
    version=VERSION,
    description='Memory- and time-efficient fine-tuning of vision backbones for MMSegmentation and MMDetection',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['e3va_mm', 'e3va_mm.*']),
    package_data={
        'e3va_mm': [
            'weights/*.pth',
            'weights/*.md',
            'data/nuclei/*.md',
            'data/nuclei/*/*.json',
            'data/nuclei/*/*/*.jpg',
        ]
    },
    python_requires='>=3.10',
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    install_requires=['safetensors'],
    extras_require={
        'seg': SEG,
        'det': DET,
        'peft': PEFT,
        'timm': TIMM,
        'quant': QUANT,
        'pretrain': PRETRAIN,
        'onnx': ONNX,
        'rotate': ROTATE,
        'test': TEST,
        'all': sorted({*SEG, *DET, *PEFT, *TIMM, *TEST}),
    },
    cmdclass={'build_py': BuildWithMim},
    entry_points={'console_scripts': [f'e3va-{name} = e3va_mm.commands:{name}' for name in COMMANDS]},
)
