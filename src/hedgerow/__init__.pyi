from . import methods as methods
from . import sketch as sketch
from . import testing as testing
from .api.comparing import Comparison as Comparison
from .api.comparing import compare as compare
from .api.comparing import report as report
from .api.explaining import explain_memory as explain_memory
from .api.running import open_run as open_run
from .api.running import run as run
from .api.runs import Run as Run
from .errors import RunFailed as RunFailed
from .errors import UserError as UserError
from .experiment import Experiment as Experiment

__version__: str
