"""For the tests of programs that train with this package.

`check_resume` trains with and without an interruption and compares every array. `assert_no_retrace`
and `assert_no_sync` guard blocks, and with `FromEpoch` the steady part of a training run.
`FaultyLoader` and `FaultAt` break a run at a chosen place. The rest is a module, data and a clock
that fit into a test.
"""

from jaxtrainer.testing.faults import FaultAt, FaultyLoader, with_nan
from jaxtrainer.testing.guards import FromEpoch, assert_no_retrace, assert_no_sync
from jaxtrainer.testing.resume import check_resume, digest_of
from jaxtrainer.testing.tiny import ManualClock, TinyModule, tiny_arrays, tiny_loader

__all__ = [
    "FaultAt",
    "FaultyLoader",
    "FromEpoch",
    "ManualClock",
    "TinyModule",
    "assert_no_retrace",
    "assert_no_sync",
    "check_resume",
    "digest_of",
    "tiny_arrays",
    "tiny_loader",
    "with_nan",
]
