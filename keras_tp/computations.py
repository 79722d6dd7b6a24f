"""What a layer computes, in terms that sharding can be decided from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Contraction:
    """A layer that computes `activation(contract(x, kernel) + bias)`: Dense, EinsumDense.

    Labels are one letter per dim; "..." stands for leading or trailing dims
    that the kernel does not see.

    Attributes:
        input, kernel, output: labels of each.
        bias: one label per dim of the bias.
        equation: what `keras.ops.einsum` is given; empty for a matmul.
        weights: names of the layer's weights that take part, the kernel first.
    """

    input: str
    kernel: str
    output: str
    bias: str
    equation: str
    weights: tuple[str, ...]

    @cached_property
    def contracted(self) -> int | None:
        """How many labels are summed over, if it is a product of matrices: the last labels of the
        input are the first of the kernel, and the others those of the output. Otherwise None.
        """
        for count in range(1, len(self.kernel) + 1):
            rest = self.input[:-count] + self.kernel[count:]
            if (self.input[-count:], self.output) == (self.kernel[:count], rest):
                return count
        return None

    @cached_property
    def determined(self) -> bool:
        """Whether each factor's gradient is a contraction of the other with the output's.

        A label that only one factor has is summed away before they meet.
        """
        known, kernel, given = set(self.input), set(self.kernel), set(self.output)
        return known <= kernel | given and kernel <= known | given


@dataclass(frozen=True)
class Lookup:
    """A layer that computes `take(embeddings, ids, axis=0)` of a (vocabulary, width) table.

    Attributes:
        weights: names of the layer's weights that take part.
        reverse: of a layer that is called in reverse as well, for logits: the weight that it
            multiplies by then, the table itself (transposed) or one of shape (width, vocabulary).
    """

    weights: tuple[str, ...] = ("embeddings",)
    reverse: str = ""


Computation = Contraction | Lookup
