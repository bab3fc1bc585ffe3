"""Fits and the figure: seconds against size, one panel for each task and axis."""

import numpy as np

AXES = dict(texts='number of texts', length='words in a text', classes='classes', vocab='words in the vocabulary',
            layers='layers', copies='near-copies of each text')
COLORS = dict(seconds='#20639b', memory='#c8553d')


def slope(sizes, values):
    "The exponent over the upper half of the sizes"
    n = max(3, (len(sizes) + 1) // 2)
    if len(sizes) < 3:
        return None
    return float(np.polyfit(np.log(sizes[-n:]), np.log(values[-n:]), 1)[0])


def exponents(rows):
    "For each task and axis the measured sizes, the exponents, and what was left out"
    fits = {}
    for row in sorted(rows, key=lambda row: row['value']):
        fit = fits.setdefault((row['task'], row['axis']), dict(sizes=[], seconds=[], mb=[], left_out=None))
        if 'seconds' in row:
            for name, value in (('sizes', row['value']), ('seconds', row['seconds']), ('mb', row['mb'])):
                fit[name].append(value)
        else:
            fit['left_out'] = (row['value'], row.get('left_out') or row['error'])
    for fit in fits.values():
        fit['exponent'] = slope(fit['sizes'], np.maximum(fit['seconds'], 1e-4))
        large = [(size, mb) for size, mb in zip(fit['sizes'], fit['mb']) if mb >= 4]
        fit['exponent_mb'] = slope(*zip(*large)) if large else None
    return fits


def shown(number):
    return '–' if number is None else f'{number:.2f}'


def lines_of_table(fits):
    from tasks import PLAN

    lines = []
    for task, (title, _, axes) in PLAN.items():
        for axis in axes:
            fit = fits.get((task, axis))
            if fit and fit['sizes']:
                sizes = f"{fit['sizes'][0]:,} to {fit['sizes'][-1]:,}"
                lines.append([title, AXES[axis], sizes, f"{fit['seconds'][-1]:.3g}", shown(fit['exponent']),
                              f"{fit['mb'][-1]:.0f}", shown(fit['exponent_mb'])])
    return lines


def panel(ax, fit):
    "Draw one curve of seconds and one of memory, with the linear slope through the last point"
    sizes, seconds = np.array(fit['sizes'], float), np.maximum(fit['seconds'], 1e-4)
    linear = seconds[-1] * sizes / sizes[-1]
    ax.plot(sizes, linear, color='0.72', linewidth=0.8, zorder=1)
    ax.plot(sizes, seconds, color=COLORS['seconds'], marker='o', markersize=3.2, linewidth=1.4, zorder=3)
    ax.set(xscale='log', yscale='log')
    ax.margins(x=0.08, y=0.12)
    other = ax.twinx()
    mb = np.array(fit['mb'], float)
    # the same number of decades on both sides, so that slopes can be compared
    low, high = ax.get_ylim()
    low = min(low, 0.5 * linear[0]) if linear[0] > 1e-4 else low
    ax.set_ylim(low, high * 6)
    top = max(mb.max(), 4) * 30
    bottom = top * low / (high * 6)
    seen = mb >= max(1, bottom)
    other.plot(sizes[seen], mb[seen], color=COLORS['memory'], marker='s', markersize=2.4, linewidth=1,
               linestyle=(0, (3, 2)))
    other.set(yscale='log')
    other.set_ylim(bottom, top)
    return other


def figure(fits, file):
    "Draw all panels: a row for each task, a column for each axis"
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from tasks import PLAN

    done = [(task, axis) for task, (_, _, axes) in PLAN.items() for axis in axes
            if len(fits.get((task, axis), {}).get('sizes', ())) >= 3]
    if not done:
        return
    n_columns = 5
    n_rows = -(-len(done) // n_columns)
    style = {'font.size': 8, 'axes.spines.top': False, 'axes.linewidth': 0.6, 'xtick.major.width': 0.6,
             'ytick.major.width': 0.6, 'svg.hashsalt': 'scaling'}
    with plt.rc_context(style):
        fig, axs = plt.subplots(n_rows, n_columns, figsize=(2.9 * n_columns, 2.25 * n_rows + 0.4), squeeze=False)
        for ax, key in zip(axs.flat, done):
            task, axis = key
            other = panel(ax, fits[key])
            ax.set_title(PLAN[task][0], fontsize=9, loc='left', pad=4)
            ax.set_xlabel(AXES[axis], labelpad=1)
            fit = fits[key]
            ax.text(0.04, 0.95, f"seconds ∝ n$^{{{shown(fit['exponent'])}}}$", color=COLORS['seconds'], va='top',
                    transform=ax.transAxes, fontsize=8.5)
            if fit['exponent_mb'] is not None:
                ax.text(0.04, 0.82, f"memory ∝ n$^{{{shown(fit['exponent_mb'])}}}$", color=COLORS['memory'], va='top',
                        transform=ax.transAxes, fontsize=8.5)
            ax.tick_params(axis='y', colors=COLORS['seconds'], which='both', labelsize=7)
            other.tick_params(axis='y', colors=COLORS['memory'], which='both', labelsize=7)
            for one in (ax.xaxis, ax.yaxis, other.yaxis):
                one.set_minor_locator(matplotlib.ticker.NullLocator())
                one.set_major_locator(matplotlib.ticker.LogLocator(numticks=6))
        for ax in axs.flat[len(done):]:
            ax.axis('off')
        fig.suptitle('Processor seconds (blue, left) and MB (red, dashed, right) against size; the grey line is '
                     'linear growth', fontsize=11, y=1 - 0.08 / fig.get_figheight(), va='top')
        fig.tight_layout(rect=(0, 0, 1, 1 - 0.3 / fig.get_figheight()), w_pad=1.2, h_pad=1.2)
        fig.savefig(file, dpi=110)
        plt.close(fig)
