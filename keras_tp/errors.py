"""What users see when a layout cannot be honoured: every problem at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class ProblemsError(ValueError):
    """Several things that are wrong at once, each a sentence or two.

    Attributes:
        problems: tuple of str, one for each problem.
        where: what they are problems of.
    """

    def __init__(self, problems: str | Iterable[str], *, where: str = ""):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        self.where = where
        super().__init__(self._message())

    def _message(self) -> str:
        if not self.where:  # made by Keras, which puts more around the message of another
            return "\n".join(self.problems)
        if len(self.problems) == 1:
            return f"1 problem in {self.where}\n  {self.problems[0]}"
        lines = [f"{len(self.problems)} problems in {self.where}"]
        lines += [f"  {i}. {problem}" for i, problem in enumerate(self.problems, start=1)]
        return "\n".join(lines)

    def __reduce__(self) -> Any:
        # Errors cross process boundaries (torchrun's error files, the tests'
        # rank pool); the default would rebuild from the rendered message.
        return (_rebuild, (type(self), self.problems, self.where))


class LayoutError(ProblemsError):
    """A layout map, plan or mesh that does not fit the model or the job.

    Raised before anything is changed. The message lists every problem of the
    kind that was looked at, each with the path or pattern it concerns, the
    numbers and what to do:

    ```
    LayoutError: 2 problems in this layout map (mesh: batch=1, model=4)
      1. '/kernel' is matched by 2 patterns: '.*', '.*/kernel'. Narrow them until one is left.
      2. pattern 'head' gives 'head' (512, 1002) a layout (None, None, 'model') of 3 entries
         for 2 dims; give each dim an axis or None.
    ```

    Attributes:
        problems: tuple of str, one sentence or two for each problem.
    """


class CheckpointError(ProblemsError):
    """A checkpoint that is damaged, or that was made of another model.

    Raised on every rank, before anything of the model is changed.

    Attributes:
        problems: tuple of str, one sentence or two for each problem.
    """


def _rebuild(kind: type[ProblemsError], problems: tuple[str, ...], where: str) -> ProblemsError:
    return kind(problems, where=where)


class LayoutWarning(UserWarning):
    """Something in a layout map that has no effect, such as a pattern that matches nothing."""
