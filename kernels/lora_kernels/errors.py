"""What the kernels refuse, always before a launch: a kernel that has started cannot say no.

LoraInputError (ValueError)
├── SlotOutOfRange      a row names a slot that the pool does not have
├── WorkListOverflow    a batch needs more rows or tiles than the fixed buffers hold
├── MixedDtypes         x, y and the pool differ, or none of fp32, fp16 and bf16
├── NotContiguous       the values of a row do not lie side by side
├── ShapeMismatch       x, y and the pool disagree about rows or columns
├── RankOverPool        an adapter has more ranks than its pages hold
└── PageConflict        a page would be written twice, or read and written, by copies that have no order
"""

from __future__ import annotations


class LoraInputError(ValueError):
    """An argument of a kernel launch is wrong; nothing was written."""


class SlotOutOfRange(LoraInputError):
    pass


class WorkListOverflow(LoraInputError):
    pass


class MixedDtypes(LoraInputError):
    pass


class NotContiguous(LoraInputError):
    pass


class ShapeMismatch(LoraInputError):
    pass


class RankOverPool(LoraInputError):
    pass


class PageConflict(LoraInputError):
    pass
