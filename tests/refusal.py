"""What is refused, told by its code: wording may improve, codes and values stay."""

from __future__ import annotations

import re
from types import TracebackType

import pytest

from afa.errors import AfaError


class refusal:
    """Within, an error of this code must be raised.

    Args:
        code: of the error.
        said: patterns that its message must have besides: values such as names and numbers, which
            a user needs whatever the wording.
        kind: of the error.
    """

    def __init__(self, code: str, *said: str, kind: type[AfaError] = AfaError) -> None:
        self._code, self._said = code, said
        self._raises = pytest.raises(kind)

    def __enter__(self) -> pytest.ExceptionInfo[AfaError]:
        self._info = self._raises.__enter__()
        return self._info

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        is_expected = bool(self._raises.__exit__(kind, error, trace))
        if is_expected:
            assert isinstance(error, AfaError)
            assert error.code == self._code, f"{error.code}: {error}"
            for pattern in self._said:
                assert re.search(pattern, str(error)), f"no '{pattern}' in: {error}"
        return is_expected
