"""Change the package in one place at a time; the tests must notice.

    python -m tests.stress.mutants mmauxq/ops tests/ops --out FILE

Each mutant is one operator, comparison, constant or condition of one file. A
forked process imports the changed file in place of the true one and runs the
tests until the first failure. FILE gets a line for each mutant that survives;
``--every N`` tries each N-th only.
"""

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.util
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip


def changes(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """(line, what, changed tree) of all mutants of a file."""
    count = sum(1 for _ in ast.walk(tree))
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        for part in (
            getattr(node, 'annotation', None),
            getattr(node, 'returns', None),
        )
        if part is not None
        for inner in ast.walk(part)
    }
    skipped = [
        i for i, node in enumerate(ast.walk(tree)) if id(node) in annotations
    ]
    for index in range(count):
        if index in skipped:
            continue
        for variant in range(2):
            changed = copy.deepcopy(tree)
            node = list(ast.walk(changed))[index]
            before = ast.unparse(node) if hasattr(node, 'lineno') else ''
            if not _change(node, variant):
                break
            after = ast.unparse(node)
            if after != before:
                yield node.lineno, f'{before} -> {after}', changed


def _change(node: ast.AST, variant: int) -> bool:
    """Change a node in place; whether there is such a variant."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        swap = SWAPS.get(type(node.op))
        if variant or swap is None:
            return False
        node.op = swap()
        return True
    if isinstance(node, ast.Compare) and not variant:
        swap = SWAPS.get(type(node.ops[0]))
        if swap is None:
            return False
        node.ops[0] = swap()
        return True
    if isinstance(node, (ast.If, ast.IfExp)):
        node.test = ast.copy_location(ast.Constant(bool(variant)), node.test)
        return True
    if isinstance(node, ast.UnaryOp) and not variant:
        if isinstance(node.op, ast.Not):
            node.op = ast.UAdd()
            node.operand = ast.copy_location(
                ast.Call(ast.Name('bool', ast.Load()), [node.operand], []),
                node,
            )
            ast.fix_missing_locations(node)
            return True
        if isinstance(node.op, ast.USub):
            node.op = ast.UAdd()
            return True
    if isinstance(node, ast.Constant) and not variant:
        if isinstance(node.value, bool):
            node.value = not node.value
            return True
        if isinstance(node.value, (int, float)):
            node.value += 1
            return True
    return False


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(
            name, self.path, loader=self
        )

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        exec(compile(self.tree, str(self.path), 'exec'), module.__dict__)


def survives(
    path: Path, tree: ast.Module, tests: list[str], patience: int
) -> bool:
    """Whether the tests pass with a changed file."""
    pid = os.fork()
    if not pid:
        signal.alarm(patience)  # an endless loop is noticed, too
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        sys.meta_path.insert(0, _Changed(name, path, tree))
        status = 1
        with contextlib.suppress(BaseException):
            with contextlib.redirect_stdout(io.StringIO()):
                status = int(
                    pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *tests])
                )
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('source', type=Path)
    parser.add_argument('tests', nargs='+')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--every', type=int, default=1)
    parser.add_argument('--patience', type=int, default=300)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    # what all mutants share is imported once; the package itself is not
    import mmengine.model  # noqa: F401
    import mmpretrain.models  # noqa: F401

    for name in [n for n in sys.modules if n.startswith('mmauxq')]:
        del sys.modules[name]
    sources = [args.source]
    if args.source.is_dir():
        sources = sorted(args.source.glob('*.py'))
    tried, alive = 0, 0
    with args.out.open('a') as out:
        for source in sources:
            path = source.resolve()
            tree = ast.parse(path.read_text())
            for number, (line, what, mutant) in enumerate(changes(tree)):
                if number % args.every:
                    continue
                tried += 1
                if survives(path, mutant, args.tests, args.patience):
                    alive += 1
                    found = dict(file=str(source), line=line, change=what)
                    print(found, flush=True)
                    out.write(json.dumps(found) + '\n')
                    out.flush()
            print(f'{source}: {tried} so far, {alive} alive', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
