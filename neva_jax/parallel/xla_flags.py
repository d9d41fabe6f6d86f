"""XLA_FLAGS of the environment, without the flags that this jaxlib does not know: XLA ends the process over one of those, and each release loses some.

A flag's name stands in the library as a string of its own. Known is what all libraries know that will read the variable: jaxlib's, and the GPU plugin's.
"""

import importlib.util
import logging
import mmap
import os
import shlex
from pathlib import Path

log = logging.getLogger(__name__)

LIBRARIES = (("jaxlib", "libjax_common.so"), ("jax_plugins.xla_cuda12", "xla_cuda_plugin.so"), ("jax_plugins.xla_cuda13", "xla_cuda_plugin.so"))


def libraries() -> list[Path]:
    """Those that are installed."""
    found = []
    for package, name in LIBRARIES:
        try:
            spec = importlib.util.find_spec(package)
        except ImportError:
            continue
        folders = spec.submodule_search_locations or () if spec else ()
        found += [path for folder in folders if (path := Path(folder, name)).exists()]
    return found


def unknown_flags(text: str, files: list[Path]) -> list[str]:
    """The names of flags in `text` (as XLA_FLAGS holds them) that some file does not know; none where there is no file to ask."""
    names = [flag.split("=", 1)[0].lstrip("-") for flag in shlex.split(text) if flag.startswith("-")]
    missing = set()
    for path in files:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            missing |= {name for name in names if content.find(b"\0" + name.encode() + b"\0") < 0}
    return [name for name in dict.fromkeys(names) if name in missing]


def filter_environment() -> None:
    """Takes unknown flags out of XLA_FLAGS, and says which. To be called before JAX opens a backend."""
    text = os.environ.get("XLA_FLAGS", "")
    unknown = unknown_flags(text, libraries()) if text.strip() else []
    if unknown:
        kept = [flag for flag in shlex.split(text) if flag.split("=", 1)[0].lstrip("-") not in unknown]
        os.environ["XLA_FLAGS"] = shlex.join(kept)
        log.warning(f"XLA_FLAGS: {', '.join(unknown)} dropped, which this jaxlib does not know and would abort over; kept: {' '.join(kept) or 'none'}")
