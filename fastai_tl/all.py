"""Everything that fastai_tl exports, in the order of its notebooks' numbers: `from fastai_tl.all import *`"""

from .core import *
from .plot import *
from .files import *
from .data.tokenize import *
from .data.blocks import *
from .data.corpus import *
from .models.trace import *
from .models.groups import *
from .models.encoder import *
from .tune.optim import *
from .tune.rates import *
from .tune.schedule import *
from .tune.unfreeze import *
from .tune.resume import *
from .tune.recipes import *
from .learners.classify import *
from .learners.language import *
from .learners.bidirectional import *
from .learners.ulmfit import *
from .evaluation.report import *
from .quickstart import *
