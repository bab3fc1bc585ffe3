"""Seconds and memory against sizes: how training, evaluation, prediction, tokenizing and the search for
near-duplicates grow.

    python benchmarks/scaling/run.py [--only train_bert near.length] [--max 100000] [--limit 60] [--again]
    python benchmarks/scaling/run.py --draw          # only the fits, the table and the figure, from the measurements

`tasks.py` has the tasks and their sizes. Each measurement is a forked process of its own with one thread. It prepares
its data and model, runs the step once at the smallest size, and then measures the step alone: seconds of the processor
(those of child processes included), and the highest resident memory above that before (VmHWM after a write to
/proc/self/clear_refs; Linux only). A step of less than 0.2 seconds is measured three times, and the least counts. A
size is left out if the last two say that it would take more than `--limit` seconds; it is written down as left out.

The exponent is the slope of a line through log seconds against log size, by least squares, over the upper half of the
sizes (three at least). That of the memory uses sizes from 4 MB on. Results are in results/scaling.json (or `--json`),
one row for each measurement; rows that are there are not measured again without `--again`."""

import gc
import json
import os
import sys
import time
import traceback
from math import log
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from common import memory_mb, offline, parser, table, write_json

RESULTS = Path(__file__).parent / 'results'


# --- one measurement ---


def processor_seconds():
    return sum(os.times()[:4])


def timed(step):
    "Processor seconds of a step, and its peak of memory above that before"
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')
    before, start = memory_mb('VmRSS'), processor_seconds()
    begin = time.process_time()
    result = step()
    seconds = time.process_time() - begin
    of_children = processor_seconds() - start - seconds
    mb = memory_mb('VmHWM') - before
    del result
    return seconds + (of_children if of_children > 0.1 else 0), max(mb, 0)


def measure(make, sizes, smallest):
    "Seconds and memory of one size"
    import torch
    from fastai_tl.all import seed_everything

    torch.set_num_threads(1)
    seed_everything(0)
    make(**smallest)()
    step = make(**sizes)
    seconds, mb = timed(step)
    more = [timed(make(**sizes))[0] for _ in range(2)] if seconds < 0.2 else []
    return dict(seconds=round(min([seconds, *more]), 4), mb=round(mb, 1))


def in_child(*args):
    "Measure in a forked process; an error message instead of figures if it fails"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        try:
            answer = measure(*args)
        except BaseException as error:
            traceback.print_exc()
            answer = dict(error=f'{type(error).__name__}: {error}'[:200])
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(answer) if answer else dict(error='the process died')


# --- all measurements ---


def chosen(only):
    "Pairs of task and axis, in the order of `--only`"
    from tasks import PLAN

    every = [(task, axis) for task, (_, _, axes) in PLAN.items() for axis in axes]
    if not only:
        return every
    return [(task, axis) for name in only for task, axis in every if name in (task, f'{task}.{axis}')]


def expected(done, value):
    "Seconds that a size will take, from the last two sizes"
    if not done:
        return 0
    *_, last = done
    power = 1
    if len(done) > 1:
        before = done[-2]
        power = log(max(last['seconds'], 1e-4) / max(before['seconds'], 1e-4)) / log(last['value'] / before['value'])
    return last['seconds'] * (value / last['value']) ** max(power, 0.5)


def sweep(rows, task, axis, values, args):
    "Measure the sizes of one axis that are not there yet"
    from tasks import BASE, PLAN

    make, base = PLAN[task][1], BASE.get(task, {}).get(axis, {})
    done = []
    for value in values:
        if args.max and value > args.max:
            break
        key = f'{task}.{axis}.{value}'
        row = rows.get(key)
        if row is None or args.again or 'left_out' in row:
            guess = expected(done, value)
            row = dict(task=task, axis=axis, value=value)
            if guess > args.limit:
                row['left_out'] = f'about {guess:.0f} s or more'
            else:
                row |= in_child(make, base | {axis: value}, base | {axis: values[0]})
            rows[key] = row
            print(key, {k: v for k, v in row.items() if k not in ('task', 'axis', 'value')}, flush=True)
            write_json(args.json, dict(rows=list(rows.values())))
        if 'seconds' not in row:
            break
        done.append(row)


def known_rows(file):
    "The measurements of a file, by name"
    rows = json.loads(file.read_text())['rows'] if file.exists() else []
    return {f"{row['task']}.{row['axis']}.{row['value']}": row for row in rows}


def main():
    ap = parser(__doc__, 'json', json=RESULTS / 'scaling.json')
    ap.add_argument('--only', nargs='*', help='tasks, or tasks with an axis, such as near.length')
    ap.add_argument('--max', type=int, help='largest size')
    ap.add_argument('--limit', type=float, default=30, help='seconds that one measurement may take')
    ap.add_argument('--again', action='store_true', help='measure sizes that are in the file again')
    ap.add_argument('--draw', action='store_true', help='only fit and draw')
    args = ap.parse_args()
    RESULTS.mkdir(exist_ok=True)
    from draw import exponents, figure, lines_of_table
    from tasks import PLAN

    rows = known_rows(args.json)
    if not args.draw:
        import fastai_tl.all  # noqa: F401 (before the forks, so that it is done once)
        import scipy.optimize, scipy.sparse, scipy.stats, sklearn.metrics, transformers  # noqa: F401, E401
        from tasks import tokenizer

        tokenizer()
        gc.freeze()  # so that collections in the children need not look at the libraries

        for task, axis in chosen(args.only):
            sweep(rows, task, axis, PLAN[task][2][axis], args)
    fits = exponents(rows.values())
    figure(fits, args.json.with_suffix('.png'))
    print(table(['task', 'axis', 'sizes', 'seconds:', 'exponent:', 'MB:', 'exponent of memory:'], lines_of_table(fits)))


if __name__ == '__main__':
    offline()
    main()
