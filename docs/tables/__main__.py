"""Write the tables of the pages from the records in docs/logs.

    python -m docs.tables            # writes them
    python -m docs.tables --check    # names those that are stale

With --check the exit status is 1 if there are any.
"""

import argparse
import sys

from .pages import filled, pages, stale
from .records import DOCS


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m docs.tables',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--check', action='store_true', help='write nothing, only compare'
    )
    check, status = parser.parse_args().check, 0
    for page in pages():
        text = page.read_text()
        for name in stale(text):
            print(f'{page.relative_to(DOCS.parent)}: {name}')
            status = int(check)
        if not check and filled(text) != text:
            page.write_text(filled(text))
    return status


if __name__ == '__main__':
    sys.exit(main())
