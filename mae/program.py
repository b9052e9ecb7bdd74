"""How the user calls this program, for the commands that it suggests. Imports no torch."""

import os

PROGRAM = "MAE_PROGRAM"  # the environment variable that says so: ranks and jobs inherit it


def program() -> str:
    """`mae` where it is the installed command that was typed, else `python run.py`."""
    return os.environ.get(PROGRAM, "python run.py")


def usage_name(module: str, word: str) -> str:
    """`mae WORD`, or `python -m mae.MODULE` where that was typed."""
    return f"mae {word}" if PROGRAM in os.environ else f"python -m mae.{module}"


def as_typed(text: str) -> str:
    """A text with commands, as this user types them."""
    return text.replace("python run.py", program())
