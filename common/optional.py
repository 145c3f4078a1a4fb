"""Packages that only some features need: imported where they are used."""

import importlib
from types import ModuleType

from common.errors import UserError


def import_optional(module: str, *, purpose: str, install: str | None = None) -> ModuleType:
    """Import a module of an optional package, for example "scipy.stats".

    Args:
        purpose: what needs it, for the message: a flag, or "figures".
        install: what to install, where that is not just the module's package.

    Raises UserError that says what to install, or, where the package is installed and cannot be
    imported (built for another version, a broken dependency, …), why.
    """
    install = install or module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in install.split() or error.name == module:
            name = package if package in install.split() else install
            raise UserError(f"{purpose} needs {name}: pip install {install}") from error
        reason = error
    except Exception as error:  # packages fail in many ways
        reason = error
    text = " ".join(str(reason).split())[:200]
    raise UserError(
        f"{purpose} needs {install}, which is installed but cannot be imported "
        f"({type(reason).__name__}: {text})"
    ) from reason
