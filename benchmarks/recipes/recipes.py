"""The recipes that benchmarks/recipes compares."""

TRAINER_RATES = (5e-5, 1e-4, 2e-4)
SMALL, WIDE = 1.15**7, 2.6  # spreads of the rates


def recipe(lr, spread=1.0, stages=None, cache=False, eps=None, sched='one_cycle', clip=None):
    """A recipe: rate of the top group, spread of the rates, stages, whether frozen layers are computed once, Adam's
    epsilon, schedule of a stage, maximum gradient norm. A stage is (groups that train, counted from the top; epochs;
    rate factor)"""
    return dict(lr=lr, spread=spread, stages=stages or [('all', 1, 1.0)], cache=cache, eps=eps, sched=sched, clip=clip)


def plan(r, n, epochs):
    "Groups, epochs and rates of the stages of recipe `r`, for `n` layer groups"
    count = {'all': n, 'half': n // 2, 'body': n - 1}
    groups = [count.get(g, g) for g, _, _ in r['stages']]
    shares = [s for _, s, _ in r['stages']]
    last = epochs - sum(shares[:-1])
    return groups, [*shares[:-1], last], [r['lr'] * k for _, _, k in r['stages']]


HEAD_FIRST = [(1, 1, 10), ('all', 1, 1.0)]
FIRST = {
    'full 1e-4': recipe(1e-4),
    'full 2e-4': recipe(2e-4),
    'discriminative 2e-4': recipe(2e-4, WIDE),
    'discriminative 4e-4': recipe(4e-4, WIDE),
    'head_then_full': recipe(2e-4, WIDE, HEAD_FIRST, True),
    'top_layers body': recipe(2e-4, WIDE, [('body', 1, 1.0)]),
    'top_layers 4': recipe(2e-4, 1.5, [(4, 1, 1.0)], True),
    'gradual': recipe(1e-4, SMALL, [(1, 1, 10), ('half', 1, 2.0), ('all', 1, 1.0)], True),
}
# Added for tagging after the first judged seed, where `head_then_full` hardly learned: higher rates, with and without
# an epoch of the head; and Adam's epsilon of 1e-8 instead of fastai's 1e-5, which may slow down weights with small
# gradients
SECOND = {
    'head_then_full 4e-4': recipe(4e-4, WIDE, HEAD_FIRST, True),
    'head_then_full 8e-4': recipe(8e-4, WIDE, HEAD_FIRST, True),
    'head_then_full 4e-4, eps 1e-8': recipe(4e-4, WIDE, HEAD_FIRST, True, 1e-8),
    'discriminative 8e-4': recipe(8e-4, WIDE),
    'full 4e-4': recipe(4e-4),
    'head_then_full, eps 1e-8': recipe(2e-4, WIDE, HEAD_FIRST, True, 1e-8),
    'discriminative 2e-4, eps 1e-8': recipe(2e-4, WIDE, eps=1e-8),
    'discriminative 4e-4, eps 1e-8': recipe(4e-4, WIDE, eps=1e-8),
}
# Higher ones, added when the Trainer had done better at 4e-4 than at 2e-4, the highest of its three rates
SECOND |= {
    'full 8e-4': recipe(8e-4),
    'discriminative 1.6e-3': recipe(1.6e-3, WIDE),
    'head_then_full 1.6e-3': recipe(1.6e-3, WIDE, HEAD_FIRST, True),
}
# Added when the schedule had turned out to be the Trainer's advantage on tags: fastai's one cycle rises for a quarter
# of the steps, the Trainer's rate not at all. Slanted triangles rise for a tenth; with and without the Trainer's
# clipped gradients
SLANTED = {}
for name in ('full 2e-4', 'discriminative 2e-4', 'head_then_full', 'top_layers 4', 'gradual'):
    SLANTED[f'{name} stlr'] = dict(FIRST[name], sched='stlr')
for name in ('discriminative 2e-4', 'head_then_full'):
    SLANTED[f'{name} stlr clip'] = dict(FIRST[name], sched='stlr', clip=1.0)
SLANTED_TAGS = {}
for name in ('full 4e-4', 'discriminative 8e-4', 'head_then_full 8e-4'):
    SLANTED_TAGS[f'{name} stlr'] = dict(SECOND[name], sched='stlr')
    SLANTED_TAGS[f'{name} stlr clip'] = dict(SECOND[name], sched='stlr', clip=1.0)
# this one was given up after one seed, because it was behind the others
CANDIDATES = [*FIRST, *(n for n in SLANTED if n != 'discriminative 2e-4 stlr clip')]
RECIPES = FIRST | SECOND | SLANTED | SLANTED_TAGS
