"""Packages that only some features need: imported where they are used."""

import importlib
from types import ModuleType

from common.errors import UserError


def import_optional(module: str, *, purpose: str) -> ModuleType:
    """Import a module of an optional package, for example "scipy.stats".

    Raises UserError that says what to install, or, where the package is installed and cannot be
    imported (built for another version, a broken dependency, …), why.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name in (package, module):
            raise UserError(f"{purpose} need {package}: pip install {package}") from error
        reason = error
    except Exception as error:  # packages fail in many ways, and none of them may end a program
        reason = error
    raise UserError(
        f"{purpose} need {package}, which cannot be imported here "
        f"({type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''})"
    ) from reason
