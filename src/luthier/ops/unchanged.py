"""What a forward and its backward both read, without a copy in between: it has to be the same at both times."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Unchanged:
    """Tensors as a forward finds them; ``check`` in its backward raises, as autograd does for what it has saved itself, if
    one of them was written to since then."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.versions = [tensor._version for tensor in tensors]

    @property
    def are_unchanged(self) -> bool:
        return self.versions == [tensor._version for tensor in self.tensors]

    def check(self) -> None:
        if not self.are_unchanged:
            raise RuntimeError(
                "A trained weight was changed in place, by an optimizer's step perhaps, between a forward and its backward, "
                "which reads it again: the gradients would be wrong. Call backward() before the weights change, or compute "
                "the loss again."
            )
