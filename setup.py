"""Packaging of MMAuxQ: names and requirements, no logic."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(
    r"__version__ = '(.+)'", (here / 'mmauxq/version.py').read_text()
).group(1)
readme = here / 'README.md'

# Bounds only: the versions that are tested stand in constraints.txt.
#
# The OpenMMLab packages exist twice under the same import names (openmmlab
# and the maintained onedl forks), so neither row is required outright.
mmrazor = ['mmrazor>=1.0.0', 'joblib']  # imports joblib and does not say so
export = [
    'onnx>=1.20',  # INT2
    # Runs it. There is none for Python 3.10, where export says so and takes
    # the 8-bit container.
    'onnxruntime>=1.24; python_version >= "3.11"',
    'onnxruntime>=1.20; python_version < "3.11"',
    'onnx-ir>=0.1.16',  # Model.clone, INT2
    'onnxscript>=0.7',  # older ones fail with onnx-ir 1.1
    'safetensors>=0.5',
    'torch>=2.8',  # has torch.onnx.ops
]
# There is none for Python 3.10 beside the onnx that export needs.
qonnx = ['qonnx>=1.0; python_version >= "3.11"']
tflite = [
    'ai-edge-litert>=2.3',  # runs INT2
    'litert-torch>=0.10',
    'safetensors>=0.5',
]
digits = ['scikit-learn']
docs = ['furo', 'myst-parser>=4', 'sphinx>=8']
extras = {
    'openmmlab': [
        'mmengine>=0.10.7',
        'mmcv-lite>=2.1.0',
        'mmpretrain>=1.2.0',
        *mmrazor,
    ],
    'onedl': [
        'onedl-mmengine>=0.10.12',
        'onedl-mmcv>=2.3.6',
        'onedl-mmpretrain>=1.3.6',
        *mmrazor,
    ],
    'compare': ['matplotlib', 'rich', 'scipy'],
    'digits': digits,
    'docs': docs,
    'export': export,
    'qonnx': [*export, *qonnx],
    'tflite': tflite,
    'tests': [
        *digits,
        *docs,
        *export,
        *qonnx,
        'build',
        'codespell',
        'hypothesis',
        'matplotlib',
        'mypy',
        'pytest>=8',
        'pytest-xdist',
        'rich',
        'ruff',
        'scipy',
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
        'setuptools<82',  # MMEngine imports pkg_resources
    ],
    extras_require=extras,
    entry_points={'console_scripts': ['mmauxq = mmauxq.__main__:command']},
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
