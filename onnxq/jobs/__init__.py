"""Independent jobs on the processes of this machine, or on a Dask or Ray cluster that is already there.

A job is a pure function of an argument and of files: where it runs, in what company and after how many attempts changes
nothing about its result. See `outcomes` for the one loop behind all backends, `open_backend` for their names.
"""

from onnxq.jobs.loop import outcomes, results
from onnxq.jobs.opening import LOCAL, open_backend, require_backend
from onnxq.jobs.task import Backend, Failed, Task

__all__ = ["LOCAL", "Backend", "Failed", "Task", "open_backend", "outcomes", "require_backend", "results"]
