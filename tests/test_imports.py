"""Imports point one way, and third-party packages are patched in one file."""

import ast
import sys
from pathlib import Path

import pytest

ORDER = [
    'quantizers',
    'layers',
    'accelerate',
    'network',
    'guidance',
    'algorithms',
    'analysis',
    'engine',
    'deploy',
    'compare',
    'cli',
]
ENTRY = 'mmauxq/algorithms/build.py'
"""The only file that imports accelerate from outside."""
PATCHED = {'torch', 'mmengine', 'mmpretrain', 'mmrazor', 'mmcv', 'numpy'}


def imported(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of all modules that a file imports, at any depth.

    Args:
        tree: The parsed file.
        package: The dotted package that holds the file.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = package.split('.')
                parts = parts[: len(parts) - node.level + 1]
                base = '.'.join([*parts, *([base] if base else [])])
            names.add(base)
            names.update(f'{base}.{alias.name}' for alias in node.names)
    return names


def broken_rules(path: str, source: str) -> list[str]:
    """What a file of the package does that it may not do.

    Args:
        path: Of the file, relative to the repository.
        source: Its text.
    """
    tree = ast.parse(source)
    parts = Path(path).with_suffix('').parts
    names = imported(tree, '.'.join(parts[:-1]))
    ours = {n.split('.')[1] for n in names if n.startswith('mmauxq.')}
    roots = {n.split('.')[0] for n in names}
    layer = parts[1]
    found = []
    if layer in ORDER:
        later = set(ORDER[ORDER.index(layer) + 1 :])
        found += [f'{path}: imports {n}' for n in sorted(ours & later)]
    if path == 'mmauxq/quantizers/functional.py':
        allowed = {'torch', *sys.stdlib_module_names}
        found += [f'{path}: imports {n}' for n in sorted(roots - allowed)]
    if parts[1:3] == ('accelerate', 'kernels'):
        allowed = {'torch', 'triton', 'mmauxq', *sys.stdlib_module_names}
        found += [f'{path}: imports {n}' for n in sorted(roots - allowed)]
    if 'accelerate' in ours and path != ENTRY and layer != 'accelerate':
        found.append(f'{path}: imports accelerate')
    if layer == 'registry' and roots != {'mmengine'}:
        found.append(f'{path}: imports more than mmengine')
    if any(n == 'mmcv.ops' or n.startswith('mmcv.ops.') for n in names):
        found.append(f'{path}: imports mmcv.ops')
    if layer != 'compat':
        found += [f'{path}: patches {n}' for n in patches(tree)]
    return found


def patches(tree: ast.AST) -> list[str]:
    """Attributes of third-party modules or classes that are assigned to."""
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, 'module', None)
            if getattr(node, 'level', 0):
                continue
            for alias in node.names:
                if (module or alias.name).split('.')[0] in PATCHED:
                    foreign.add((alias.asname or alias.name).split('.')[0])
    found = []
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ''
            if name == 'setattr':
                targets = [ast.Attribute(node.args[0], 'setattr')]
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if root is not target and isinstance(root, ast.Name):
                if root.id in foreign:
                    found.append(ast.unparse(target))
    return found


def test_rules_hold(root):
    files = sorted((root / 'mmauxq').rglob('*.py'))
    files = [f for f in files if '.mim' not in f.parts]
    assert len(files) > 5
    broken = []
    for file in files:
        path = str(file.relative_to(root))
        broken += broken_rules(path, file.read_text())
    assert broken == []


@pytest.mark.parametrize(
    'path, source',
    [
        ('mmauxq/quantizers/functional.py', 'import mmengine'),
        ('mmauxq/quantizers/functional.py', 'from .base import Quantizer'),
        ('mmauxq/layers/a.py', 'from ..network import x'),
        ('mmauxq/accelerate/kernels/a.py', 'import mmengine'),
        ('mmauxq/accelerate/a.py', 'from mmauxq.guidance import Tap'),
        ('mmauxq/algorithms/a.py', 'from mmauxq.accelerate import Speed'),
        ('mmauxq/engine/a.py', 'import mmauxq.accelerate.step'),
        ('mmauxq/quantizers/a.py', 'def f():\n    import mmauxq.engine.x'),
        ('mmauxq/guidance/a.py', 'from mmauxq import algorithms'),
        ('mmauxq/registry.py', 'import torch'),
        ('mmauxq/engine/a.py', 'from mmauxq.deploy import slim_checkpoint'),
        ('mmauxq/deploy/a.py', 'from mmauxq.cli import main'),
        ('mmauxq/layers/a.py', 'from mmcv.ops import nms'),
        ('mmauxq/layers/a.py', 'import torch\ntorch.nn.ReLU.forward = None'),
        ('mmauxq/layers/a.py', 'import torch.nn as nn\nsetattr(nn, "a", 1)'),
    ],
)
def test_checker_can_fail(path, source):
    assert broken_rules(path, source)


@pytest.mark.parametrize(
    'path, source',
    [
        ('mmauxq/quantizers/functional.py', 'import math\nimport torch'),
        ('mmauxq/algorithms/build.py', 'from mmauxq import accelerate'),
        ('mmauxq/layers/a.py', 'from mmauxq.quantizers import LSQ'),
        ('mmauxq/compat.py', 'import torch\ntorch.a = 1'),
        ('mmauxq/layers/a.py', 'import torch\nx = object()\nx.a = torch.a'),
    ],
)
def test_checker_lets_pass(path, source):
    assert broken_rules(path, source) == []


def test_missing_mmengine_is_one_line(run_python, tmp_path):
    (tmp_path / 'hide.py').write_text(
        'import sys\n'
        'sys.modules["mmengine"] = None\n'
        'try: import mmauxq\n'
        'except ImportError as error: print(error)\n'
    )
    done = run_python('hide.py')
    assert 'pip install "mmauxq[openmmlab]"' in done.stdout, done.stderr
    assert done.stdout.count('\n') == 1
