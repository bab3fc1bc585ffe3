"""Kill one of several processes again and again: do the others stop, and does the same command finish the fit?

    python benchmarks/distributed/run.py --repeats 20 --json benchmarks/distributed/results/kill.json

Each time `torchrun` trains with `train.py`, a process that is drawn at random gets SIGKILL at a random step, and the
same command is started again until it ends well. The weights must be those of a run that nobody disturbs, bit by bit.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from common import parser, write_json

TRAIN = Path(__file__).with_name('train.py')


def torchrun(folder, processes, kill=None):
    "Run the fit; the exit status and what was written"
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    options = [] if kill is None else ['--kill', *map(str, kill)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([*command, str(TRAIN), str(folder), *options], env=env, capture_output=True, text=True,
                          timeout=600)
    return done.returncode, done.stdout + done.stderr


def results(folder, processes):
    "What each process wrote at the end"
    return [json.loads((folder/f'result_{i}.json').read_text()) for i in range(processes)]


def killed_run(number, processes, steps, expected):
    "Kill one process once, and run the fit to its end; a row of the table"
    rng = random.Random(number)
    kill = rng.randrange(processes), rng.randrange(1, steps)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start = time.time()
        status, text = torchrun(folder, processes, kill)
        seconds = time.time()-start
        again, text = torchrun(folder, processes) if status else (None, text)
        same = again == 0 and all(o['weights'] == expected for o in results(folder, processes))
        return dict(process=kill[0], step=kill[1], status=status, seconds=round(seconds, 1), again=again, same=same)


if __name__ == '__main__':
    ap = parser(__doc__, 'json')
    ap.add_argument('--repeats', type=int, default=20)
    ap.add_argument('--processes', type=int, default=2)
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        status, text = torchrun(Path(folder), args.processes)
        if status:
            raise SystemExit(text)
        quiet = results(Path(folder), args.processes)
        quiet_seconds = round(time.time()-start, 1)
    rows = []
    for number in range(args.repeats):
        rows.append(killed_run(number, args.processes, quiet[0]['steps'], quiet[0]['weights']))
        print(rows[-1], flush=True)
    good = sum(row['same'] for row in rows)
    print(f'{good} of {len(rows)} went on to the same weights')
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, dict(processes=args.processes, quiet_seconds=quiet_seconds, quiet=quiet, runs=rows))
