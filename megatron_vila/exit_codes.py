"""Exit codes of ``python -m megatron_vila.train``, the same on every rank of a run.

A launcher or scheduler decides by them: start the same command again after ``STOPPED``, do not after the others.
"""

from __future__ import annotations

FINISHED = 0
"""all steps are done, the last evaluation too"""
FAILED = 1
"""a fault of the program or of the machine, with a traceback or the name of the rank that is missing; or stopped by a signal
where the same command would start over: with checkpoint.save=false or checkpoint.resume=false"""
USER_ERROR = 2
"""something that a user can cure; the one message says how"""
STOPPED = 75
"""stopped by a signal, nothing lost: the same command continues (sysexits' EX_TEMPFAIL)"""
INTERRUPTED = 130
"""ended at once by Ctrl-C, as a shell says it. A run that has begun ends so at the second one; steps since the last checkpoint
are lost"""
