"""Kill one of several processes again and again: do the others stop, and does the same fit go on to its end?

    python benchmarks/distributed/run.py --kills 20 --json benchmarks/distributed/results/kills.json
    python benchmarks/distributed/run.py --kills 2 --torchrun --json benchmarks/distributed/results/torchrun.json

Each time the processes train with `train.py`. At a random moment after the first batch, a process that is drawn at
random gets SIGKILL. The row says how long the last of the others lived after that, and with what message it ended.
Then the same fit is started again. Its weights must be those of a run that nobody disturbs, bit by bit, in all
processes.

The processes are forks of one that has imported everything, without a program that watches them: each has to notice
by itself that another one is gone. With `--torchrun`, PyTorch's launcher starts them, and ends them as well. The rows
of a JSON file are kept: the same command goes on after a stop."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from common import parser, write_json

TRAIN = Path(__file__).with_name('train.py')
MESSAGE = 'RunError: All processes must run until the end'


# --- two ways to start the processes ---


class Forks:
    "The processes as forks of this one; `pids`, by their number"

    def __init__(self, folder, n):
        from train import train
        from fastai_tl.processes import free_port

        os.environ.update(WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
        self.folder, self.pids = folder, []
        for rank in range(n):
            pid = os.fork()
            if not pid:
                self.child(train, rank)
            self.pids.append(pid)

    def child(self, train, rank):
        log = os.open(self.folder/f'log_{rank}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        code = 1
        try:
            train(self.data, self.folder)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def wait(self):
        "Exit statuses, by number"
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def logs(self):
        return [(self.folder/f'log_{rank}').read_text() for rank in range(len(self.pids))]


class Torchrun:
    "The processes as `torchrun` starts them"

    def __init__(self, folder, n):
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n)]
        env = {**os.environ, 'OMP_NUM_THREADS': '1'}
        self.log = folder/'log'
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen([*command, str(TRAIN), str(folder)], env=env, stdout=log, stderr=log)

    @property
    def pids(self):
        children = Path(f'/proc/{self.process.pid}/task/{self.process.pid}/children').read_text().split()
        return [int(pid) for pid in children if b'train.py' in Path(f'/proc/{pid}/cmdline').read_bytes()]

    def wait(self):
        return [self.process.wait()]

    def logs(self):
        return [self.log.read_text()]


# --- one kill ---


def started(folder, n):
    return all((folder/f'started_{rank}').exists() for rank in range(n))


def results(folder, n):
    "What each process wrote at the end"
    return [json.loads((folder/f'result_{i}.json').read_text()) for i in range(n)]


def quiet_run(start, folder, n):
    "Seconds from the first batch to the end, and what the processes ended with"
    processes = start(folder, n)
    while not started(folder, n):
        time.sleep(.01)
    begin = time.time()
    statuses = processes.wait()
    if any(statuses):
        raise SystemExit('\n'.join(processes.logs()))
    return time.time()-begin, results(folder, n)


def killed_run(start, folder, n, seconds, rng, expected):
    "Kill one process and run the fit to its end; a row of the table, `None` if the fit was done before the kill"
    processes = start(folder, n)
    while not started(folder, n):
        time.sleep(.01)
    number, after = rng.randrange(n), rng.uniform(0, seconds)
    time.sleep(after)
    pids = processes.pids
    if len(pids) < n:
        processes.wait()
        return None
    os.kill(pids[number], signal.SIGKILL)
    begin = time.time()
    statuses = processes.wait()
    if not any(statuses):
        return None
    logs = processes.logs()
    others = [log for i, log in enumerate(logs) if len(logs) == 1 or i != number]
    said = all(MESSAGE in log or 'Signal 9 (SIGKILL)' in log for log in others)
    row = dict(process=number, after=round(after, 1), statuses=statuses, others_stopped=round(time.time()-begin, 1),
               message=said, checkpoint=(folder/'fit.safetensors').exists())
    again = start(folder, n)
    row['again'] = again.wait()
    row['same'] = not any(row['again']) and all(o['weights'] == expected for o in results(folder, n))
    return row


def main():
    ap = parser(__doc__, 'json')
    ap.add_argument('--kills', type=int, default=20)
    ap.add_argument('--processes', type=int, default=2)
    ap.add_argument('--torchrun', action='store_true', help='start the processes with torchrun')
    args = ap.parse_args()
    if not args.torchrun:
        from train import data

        Forks.data = data()
    start, n = Torchrun if args.torchrun else Forks, args.processes
    with tempfile.TemporaryDirectory() as folder:
        seconds, quiet = quiet_run(start, Path(folder), n)
    rows, too_late = [], 0
    if args.json and args.json.exists(): # go on after a stop
        before = json.loads(args.json.read_text())
        if before['processes'] == n and before['quiet'] == quiet:
            rows, too_late = before['kills'], before['too_late']
    while len(rows) < args.kills:
        rng = random.Random(f'{len(rows)} {too_late}')
        with tempfile.TemporaryDirectory() as folder:
            row = killed_run(start, Path(folder), n, seconds, rng, quiet[0]['weights'])
        if row is None:
            too_late += 1
            continue
        rows.append(row)
        print(row, flush=True)
        res = dict(processes=n, quiet_seconds=round(seconds, 1), quiet=quiet, too_late=too_late, kills=rows,
                   longest=max(row['others_stopped'] for row in rows),
                   messages=sum(row['message'] for row in rows), went_on=sum(row['same'] for row in rows))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, res)
    print({name: value for name, value in res.items() if name not in ('kills', 'quiet')})


if __name__ == '__main__':
    main()
