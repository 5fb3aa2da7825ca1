"""hedgerow: federated fine-tuning of large language models.

`import hedgerow as hr`: `hr.run` runs an experiment, `hr.open_run` opens a run again, `hr.compare`
and `hr.report` put runs beside each other, `hr.methods` has the methods. What is imported is what
is used: `__init__.pyi` says where each name is from.
"""

import lazy_loader

from hedgerow.environment import quieten_imports

quieten_imports()

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
del quieten_imports
