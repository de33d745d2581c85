"""The site: ``python -m sphinx -W docs docs/_build``."""

import sys
from pathlib import Path

from mmauxq import compat
from mmauxq.version import __version__

sys.path.insert(0, str(Path(__file__).parent))
compat.enable()  # pages are made from classes that import MMPretrain

project = 'MMAuxQ'
version = release = __version__
copyright = 'the authors of MMAuxQ'
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'lookup',
]
exclude_patterns = ['_build', 'logs']

myst_heading_anchors = 3
highlight_language = 'none'  # indented blocks are commands as often as code

smartquotes = False  # commands are typed as they stand

autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
python_maximum_signature_line_length = 79

html_theme = 'furo'
html_title = f'MMAuxQ {version}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sphinx = False
linkcheck_retries = 2
