"""Loading without the reports and progress bars of the Hugging Face libraries."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Silence `diffusers` or `transformers`, and leave its settings as the program had them.

    What they report at length is refused in one sentence.
    """
    logging: Any = importlib.import_module(f"{library}.utils.logging")
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
