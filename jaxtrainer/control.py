"""The control vector: what the host tells the compiled program of a dispatch, as int32.

`[APPLY + capacity]`: the slots below, then a flag for each batch of the chunk. The loops fill it,
`step` reads it. Imports nothing of the package.
"""

START, STOP, RESET, EPOCH, APPLY = range(5)
"""First batch of the chunk to run, the one after the last, whether to reset the totals, the
epoch's index; from `APPLY` on the flags."""

ENDS_WINDOW, ENDS_EPOCH, LEFT_OUT = 1, 2, 4
"""Bits of a flag: the batch ends an accumulation window, is the last of its epoch, or is to change
nothing (for which there must be a guard in the step)."""
