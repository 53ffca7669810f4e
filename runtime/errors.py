"""The one exception people see, what other errors say in a line, and the check for optional libraries."""

import importlib
from types import ModuleType


class FewstepError(Exception):
    """Something the user can put right; the message is one sentence that says what and how."""


def first_line(error: Exception) -> str:
    """What a library has to say, which may run to pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or say which extra brings it.

    Raises:
        FewstepError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.split(".")[0] != module.split(".")[0]:
            raise
        raise FewstepError(f'{module} is not installed: pip install "fewstep[{extra}]"') from missing
