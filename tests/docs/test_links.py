"""Links of the pages: to files and headings of this repository."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md')),
    ROOT / 'CHANGELOG.md',
    *sorted(
        page
        for page in (ROOT / 'docs').rglob('*.md')
        if not {'_build', 'logs'} & set(page.parts)
    ),
]
CODE = re.compile(r'^```.*?^```$|^ {4,}\S[^\n]*$|`[^`\n]+`', re.M | re.S)
LINK = re.compile(r'\]\(([^)\s]+)\)')


def links(page: Path) -> list[str]:
    """What the page links to, outside of code."""
    return LINK.findall(CODE.sub('code', page.read_text()))


def anchors(page: Path) -> set[str]:
    """Those of the headings, as GitHub and the site make them."""
    text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r'^#+ (.+)$', text, flags=re.M):
        kept = re.sub(r'[^\w\- ]', '', heading.lower())
        found.add(kept.replace(' ', '-'))
    return found


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match('[a-z]+:', link):
            assert link.startswith('https://'), link
            continue
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_links_are_found():
    found = {page.name: links(page) for page in PAGES}
    assert 'docs/results.md#the-quick-start' in found['README.md']
    assert sum(map(len, found.values())) > 150


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('# A `b_c`, d\n\n```bash\n# no heading\n```\n## E - f?\n')
    assert anchors(page) == {'a-b_c-d', 'e---f'}
