"""Pages that are made from the code: commands, config keys, results.

A Sphinx extension with the directives ``commands``, ``config-keys``, ``api``
and ``results``. Each writes reStructuredText, as docstrings do.
"""

import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import yaml
from docutils import nodes
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective

import mmauxq
from mmauxq import cli
from mmauxq.cli.run_command import build_parser
from mmauxq.engine.config_validation import BUILDERS, VARIADIC, own_names

ROOT = Path(__file__).parent.parent
HEADER = re.compile(r'^(Args|Attributes|Raises|Returns|Yields):$', re.M)
LONGEST = 60


class Key(NamedTuple):
    """A key of a config section."""

    name: str
    type: str
    default: str
    meaning: str


OTHERS = (
    Key('by_epoch', 'bool', '', 'In the place of ``type``: by epochs?'),
    Key('constructor', 'str', '', "Of MMEngine's optimizer wrappers."),
    Key('paramwise_cfg', 'dict', '', "Of MMEngine's constructors."),
    Key(
        'per_channel', 'bool', 'False',
        'Whether each output channel of a weight, or each input channel of '
        'an activation, has a scale of its own.',
    ),
    Key('priority', 'int | str', '', "Of MMEngine's hooks."),
)  # fmt: skip
"""Keys that a builder takes out of a section."""
TAPS = (
    "Where F is read: ``'auto'``, the repeated blocks; ``'stage_ends'``, of "
    'these the last before each change of shape; or shell patterns of module '
    'names.'
)
INIT = "Initialisation, as of MMEngine's ``BaseModule``."


# --- config keys -------------------------------------------------------------


def keys_of(cls: Callable) -> list[Key]:
    """What a config section of a class takes, from its signature and its
    docstrings, in the order of the signature."""
    if not inspect.isclass(cls):
        return []
    parameters = inspect.signature(cls).parameters
    taken: set[str] = set()
    given: set[str] = set()
    for base, (more, fewer) in BUILDERS.items():
        if issubclass(cls, base):
            taken, given = taken | more, given | fewer
    if 'num_channels' not in parameters:
        taken.discard('per_channel')
    meanings, keys = {'init_cfg': INIT, **meanings_of(cls)}, []
    for name, parameter in parameters.items():
        kind, default = parameter.annotation, parameter.default
        if name in given or parameter.kind in VARIADIC:
            continue
        if name == 'taps':  # from places, the builder makes tensors to read
            kind, default = str | list, cls.default_taps({})
            meanings[name] = TAPS
        shown = default_name(default)
        keys.append(Key(name, type_name(kind), shown, meanings.get(name, '')))
    return keys + [
        key
        for key in OTHERS
        if key.name in taken and key.name not in parameters
    ]


def meanings_of(cls: type) -> dict[str, str]:
    """Name -> meaning of the arguments of a class, from its docstring or that
    of the nearest base which says more than where to look."""
    found: dict[str, str] = {}
    for owner in inspect.getmro(cls):
        if not owner.__module__.startswith('mmauxq.'):
            continue
        doc = inspect.cleandoc(vars(owner).get('__doc__') or '')
        lines = GoogleDocstring(doc, Config(napoleon_use_param=True)).lines()
        for field in re.split('^:param ', '\n'.join(lines), flags=re.M)[1:]:
            name, _, meaning = field.partition(': ')
            if re.match(r'(See\s|$)', found.get(name, '')):
                meaning = re.split(r'^(?::|\.\. )', meaning, flags=re.M)[0]
                found[name] = inspect.cleandoc(meaning).strip()
        elsewhere = re.search('^Args: as (of .*)', doc, re.M)
        if elsewhere:
            for name in inspect.signature(cls).parameters:
                found.setdefault(name, f'As {elsewhere[1]}')
    return found


def type_name(annotation: Any) -> str:
    """An annotation without the modules of its names."""
    if annotation is inspect.Parameter.empty or annotation is Any:
        return ''
    name = inspect.formatannotation(annotation)
    return re.sub(r'(\w+\.)+(?=\w)', '', name)


def default_name(value: Any) -> str:
    """A default as a config has it, ``needed`` if there is none."""
    if value is inspect.Parameter.empty:
        return 'needed'
    shown = repr(value).replace('<factory>', '{}')
    return shown if len(shown) <= LONGEST else '...'


def config_text(cls: Callable) -> str:
    """What a class is, and the table of its keys."""
    doc = inspect.cleandoc(cls.__doc__ or '')
    rows = [
        [f'``{key.name}``', code(key.type), code(key.default), key.meaning]
        for key in keys_of(cls)
    ]
    text = HEADER.split(doc)[0]
    if not rows:
        return text
    head = ['key', 'type', 'default', 'meaning']
    return f'{text}\n\n{list_table(head, rows, [18, 20, 16, 46])}'


# --- commands ----------------------------------------------------------------


def options_of(name: str) -> list[tuple[str, str]]:
    """Option and meaning, of all arguments of a command."""
    parser = build_parser(importlib.import_module(f'mmauxq.cli.{name}'))
    formatter = parser._get_formatter()
    options = []
    for action in parser._actions:
        shown = formatter._format_action_invocation(action)
        if action.help == '==SUPPRESS==' or action.dest == 'help':
            continue
        text = formatter._expand_help(action) if action.help else ''
        if action.default not in (None, False, []) and '(default' not in text:
            text = f'{text} (default: {action.default})'.strip()
        options.append((shown, text))
    return options


def command_text(name: str) -> str:
    """What a command does, its usage, and the table of its options."""
    command = importlib.import_module(f'mmauxq.cli.{name}')
    usage = build_parser(command, f'mmauxq {name}').format_usage()
    does = [
        literal(part) if part.startswith(' ') else part
        for part in inspect.cleandoc(command.__doc__).split('\n\n')
    ]
    rows = [[f'``{option}``', text] for option, text in options_of(name)]
    return '\n\n'.join(
        [
            *does,
            literal(usage),
            list_table(['argument', 'meaning'], rows, [35, 65]),
        ]
    )


# --- results -----------------------------------------------------------------


def results(data: str) -> list[list[str]]:
    """Rows of the recipes of configs/metafile.yml with results on a data set:
    recipe, top-1, seeds, its float start, difference of the means, records,
    overrides."""
    file = ROOT / 'configs/metafile.yml'
    models = {
        model['Name']: model
        for model in yaml.safe_load(file.read_text())['Models']
        if 'Results' in model
    }
    rows = []
    for name, model in models.items():
        about, top1 = model['Metadata'], _top1(model)
        if about['Training Data'] != data:
            continue
        start, gap = about.get('Start', ''), ''
        if start:
            gap = f'{top1 - _start_top1(model, models[start]):+.2f}'
        spread = about.get('Standard Deviation')
        shown = f'{top1:.2f}'
        if spread:
            shown = f'{shown} ± {spread:.2f}'.replace(' ', '\xa0')
        rows.append(
            [
                code(name), shown, str(about['Seeds']), code(start), gap,
                code(about.get('Records', '').removeprefix('docs/logs/')),
                code(about.get('Overrides', '')),
            ]
        )  # fmt: skip
    return rows


def _start_top1(model: dict, start: dict) -> float:
    """Of the float networks that the runs of a recipe started from, where
    their records name it; else of the recipe that trains such networks."""
    file, arm = (model['Metadata'].get(key) for key in ('Records', 'Arm'))
    if arm is None:
        return _top1(start)
    rows = map(json.loads, (ROOT / file).read_text().splitlines())
    runs = [row for row in rows if row.get('arm') == arm]
    found = [run['float_final'] for run in runs if run.get('float_final')]
    return mean(found) if found else _top1(start)


def _top1(model: dict) -> float:
    return model['Results'][0]['Metrics']['Top 1 Accuracy']


# --- Sphinx ------------------------------------------------------------------


def code(text: str) -> str:
    """As literal text; nothing for nothing."""
    return f'``{text}``' if text else ''


def literal(text: str) -> str:
    """As a block of literal text."""
    return f'::\n\n{textwrap.indent(text, "    ")}'


def list_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int]
) -> str:
    """A table whose cells are reStructuredText."""
    lines = ['.. list-table::', '   :header-rows: 1', '   :class: names']
    lines += [f'   :widths: {" ".join(map(str, widths))}', '']
    for row in [head, *rows]:
        for i, cell in enumerate(row):
            mark = '     - ' if i else '   * - '
            lines.append(mark + textwrap.indent(cell, ' ' * 7).lstrip())
    return '\n'.join(lines)


class Generated(SphinxDirective):
    """Text, or sections of a title and a text."""

    optional_arguments = 1
    final_argument_whitespace = True

    def text(self, text: str) -> list[nodes.Node]:
        return self.parse_text_to_nodes(f'```{{eval-rst}}\n{text}\n```')

    def section(self, title: str, text: str) -> nodes.Node:
        section = nodes.section(ids=[nodes.make_id(title)])
        section += nodes.title('', '', nodes.literal('', title))
        self.state.document.note_explicit_target(section, section)
        section += self.text(text)
        return section


class Commands(Generated):
    """All commands."""

    def run(self) -> list[nodes.Node]:
        return [
            self.section(f'mmauxq {name}', command_text(name))
            for name in cli.COMMANDS
        ]


class ConfigKeys(Generated):
    """The keys of a class, or of all that a package registers."""

    def run(self) -> list[nodes.Node]:
        name, known = self.arguments[0], own_names()
        module, _, last = name.rpartition('.')
        if name in known or last[0].isupper():
            cls = known.get(name)
            cls = cls or getattr(importlib.import_module(module), last)
            return self.text(config_text(cls))
        return [
            self.section(kind, config_text(cls))
            for kind, cls in known.items()
            if f'{cls.__module__}.'.startswith(f'{name}.')
        ]


class Api(Generated):
    """What ``import mmauxq`` gives."""

    def run(self) -> list[nodes.Node]:
        names = sorted(mmauxq.API)
        return self.text(
            '\n'.join(f'.. autofunction:: mmauxq.{name}' for name in names)
        )


class Results(Generated):
    """The recipes with results on a data set."""

    def run(self) -> list[nodes.Node]:
        head = [
            'recipe', 'top-1', 'seeds', 'starts from', 'difference',
            'records in docs/logs', 'cfg-options',
        ]  # fmt: skip
        rows = results(self.arguments[0])
        return self.text(list_table(head, rows, [16, 12, 6, 14, 10, 20, 22]))


def on_site(text: str, from_root: bool = False) -> str:
    """A page whose links lead on the site where they lead on GitHub.

    Args:
        text: The page.
        from_root: Whether it lies beside ``docs``, whose pages include it.
    """
    if from_root:
        text = re.sub(r'\]\((?![a-z]+:|#|docs/)', '](../', text)
        text = text.replace('](docs/', '](')
    names = r'\]\((?:\.\./)+(README|CONTRIBUTING|CHANGELOG)\.md'
    return re.sub(names, lambda m: f'](/{m[1].lower()}.md', text)


def read_page(app: Any, name: str, source: list[str]) -> None:
    """Sphinx's event of a page that was read."""
    source[0] = on_site(source[0])


def read_included(app: Any, file: Path, name: str, source: list[str]) -> None:
    """Sphinx's event of a page that another one includes."""
    source[0] = on_site(source[0], from_root=True)


def setup(app: Any) -> dict:
    """Called by Sphinx."""
    app.connect('source-read', read_page)
    app.connect('include-read', read_included)
    for directive in (Commands, ConfigKeys, Api, Results):
        name = re.sub(r'(?<=[a-z])(?=[A-Z])', '-', directive.__name__)
        app.add_directive(name.lower(), directive)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
