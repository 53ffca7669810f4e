"""Methods that turn a teacher into a student, one file each; `training/method.py` says what a file offers."""

import importlib
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ...runtime.errors import FewstepError

if TYPE_CHECKING:
    from ..method import Method

METHODS = {
    "dmd2": "improved distribution matching distillation (arXiv 2405.14867)",
    "progressive": "progressive distillation (arXiv 2202.00512)",
    "rectified-flow": "reflow and k-step distillation (arXiv 2209.03003)",
    "rectified-flow-plus": "reflow with improved training (arXiv 2405.20320)",
    "lcm": "latent consistency distillation (arXiv 2310.04378)",
    "consistency": "consistency distillation without skipping, the baseline (arXiv 2303.01469)",
    "scott": "stochastic consistency distillation with a discriminator (arXiv 2403.01505)",
}
"""Every method by name, with what `fewstep train --help` says of it; the file is named alike, `-` written `_`."""


def get_method(name: str) -> "Method":
    """Load a method's file.

    Raises:
        FewstepError: there is none of that name.
    """
    if name not in METHODS:
        guess = get_close_matches(name.lower(), METHODS, n=1)
        hint = f": did you mean {guess[0]}?" if guess else ":"
        raise FewstepError(f"there is no method {name!r}{hint} the methods are {', '.join(METHODS)}")
    module: Any = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    method: Method = module
    return method
