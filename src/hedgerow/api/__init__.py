"""What people import: `import hedgerow as hr`, then `hr.run`, `hr.compare` and the rest.

The command line is thin over the same functions.
"""

from hedgerow.api.comparing import Comparison, compare, report
from hedgerow.api.explaining import explain_memory
from hedgerow.api.running import open_run, run
from hedgerow.api.runs import Run

__all__ = ["Comparison", "Run", "compare", "explain_memory", "open_run", "report", "run"]
