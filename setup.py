"""Packaging; see README.md for the ways to install."""

from pathlib import Path

from setuptools import find_packages, setup

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
PRETRAIN = ['onedl-mmpretrain>=1.3']
ROTATE = [*DET, 'onedl-mmrotate>=1.2']
TEST = ['pytest', 'pytest-cov', 'pytest-xdist', 'pyyaml', 'ruff']

setup(
    name='e3va_mm',
    version=VERSION,
    description='Memory- and time-efficient fine-tuning of vision backbones for MMSegmentation and MMDetection',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['e3va_mm', 'e3va_mm.*']),
    package_data={'e3va_mm': ['weights/*.pth', 'weights/*.md']},
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
        'pretrain': PRETRAIN,
        'rotate': ROTATE,
        'test': TEST,
        'all': sorted({*SEG, *DET, *PEFT, *TIMM, *TEST}),
    },
)
