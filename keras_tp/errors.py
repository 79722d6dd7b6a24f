"""What users see when a layout cannot be honoured: every problem at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class LayoutError(ValueError):
    """A layout map, plan or mesh that does not fit the model or the job.

    Raised before anything is changed. The message lists every problem found,
    each with the path or pattern it concerns, the numbers and a remedy:

    ```
    LayoutError: 2 problems in this layout map (mesh: batch=1, model=4)
      1. pattern '.*qkv/kernel' matches no variable. Nearest: 'query/kernel'.
      2. 'head/kernel' has shape (512, 1002), 2 dims, but pattern 'head/.*'
         gives a layout of 3 entries: (None, None, 'model').
    ```

    Attributes:
        problems: tuple of str, one sentence or two for each problem.
    """

    def __init__(self, problems: str | Iterable[str], *, where: str = "this layout map"):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        self.where = where
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.problems) == 1:
            return f"1 problem in {self.where}\n  {self.problems[0]}"
        lines = [f"{len(self.problems)} problems in {self.where}"]
        lines += [f"  {i}. {problem}" for i, problem in enumerate(self.problems, start=1)]
        return "\n".join(lines)

    def __reduce__(self) -> Any:
        # Errors cross process boundaries (torchrun's error files, the tests'
        # rank pool); the default would rebuild from the rendered message.
        return (_rebuild, (self.problems, self.where))


def _rebuild(problems: tuple[str, ...], where: str) -> LayoutError:
    return LayoutError(problems, where=where)


class LayoutWarning(UserWarning):
    """Something in a layout map that has no effect, such as a pattern that matches nothing."""
