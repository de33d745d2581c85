"""Change valid recipes at random; each trains a step or is refused.

    python -m tests.stress.configs --cases 500 --out DIR

DIR/results.jsonl has a line for each case; the exit status is 0 only if none
ended otherwise.
"""

import argparse
import collections
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support import mutations


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)
    results = (args.out / 'results.jsonl').open('w')
    count: collections.Counter = collections.Counter()

    @settings(
        max_examples=args.cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(args.seed)
    @given(mutations.mutations())
    def case(mutation: mutations.Mutation) -> None:
        folder = args.out / 'case'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            status, out = mutations.run(mutation, folder)
            found = mutations.verdict(mutation, status, out, folder)
        except BaseException as error:
            found, out = f'raised {error!r}', ''
        good = found in ('trained', 'refused')
        count[found if good else 'wrong'] += 1
        says = [s for s in out.splitlines() if s.startswith('error: ')]
        line = dict(case=str(mutation), verdict=found, says=says[:1])
        results.write(json.dumps(line) + '\n')
        results.flush()
        if not good:
            print(mutation, '->', found, file=sys.__stdout__, flush=True)

    case()
    print(dict(count))
    return int(count['wrong'] > 0)


if __name__ == '__main__':
    sys.exit(main())
