"""Packaging of MMAuxQ: names and requirements, no logic."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(
    r"__version__ = '(.+)'", (here / 'mmauxq/version.py').read_text()
).group(1)
readme = here / 'README.md'

# The OpenMMLab packages exist twice under the same import names (openmmlab
# and the maintained onedl forks), so neither row is required outright.
export = ['onnx', 'onnxscript', 'onnxruntime', 'safetensors']
extras = {
    'openmmlab': [
        'mmengine==0.10.7',
        'mmcv-lite==2.1.0',
        'mmpretrain==1.2.0',
        'mmrazor==1.0.0',
        'joblib',  # mmrazor imports it and does not say so
    ],
    # mmcv-lite 2.1.0 would bring mmengine in, over its fork: install it by
    # hand with --no-deps (README).
    'onedl': [
        'onedl-mmengine==0.10.12',
        'onedl-mmpretrain==1.3.6',
        'mmrazor==1.0.0',
        'joblib',
        'opencv-python>=3',
        'Pillow',
        'addict',
        'yapf',
    ],
    'digits': ['scikit-learn'],
    'export': export,
    'tests': [
        *export,
        'build',
        'codespell',
        'hypothesis',
        'mypy',
        'pytest>=8',
        'pytest-xdist',
        'ruff',
        'scikit-learn',
        'wheel',
    ],
}

setup(
    name='mmauxq',
    version=version,
    description='Train 2- to 4-bit image classifiers with a full-precision '
    'auxiliary module, in OpenMMLab',
    long_description=readme.read_text() if readme.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10,<3.13',
    packages=find_packages(include=['mmauxq', 'mmauxq.*']),
    include_package_data=True,
    install_requires=[
        'torch>=2.6',
        'torchvision',
        'numpy',
        'matplotlib',
        'rich',
        'scipy',
        'setuptools<82',
    ],
    extras_require=extras,
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
