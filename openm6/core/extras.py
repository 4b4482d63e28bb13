"""Optional libraries: the extras of this package that bring them, and the command that installs an extra."""

import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from openm6.core.errors import UsageError


def require(extra: str, *modules: str) -> None:
    """Raises UsageError, with the command that installs `extra`, where one of the modules is not installed."""
    missing = [name for name in modules if not is_installed(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(f"{', '.join(missing)} {verb} not installed: {install_command(extra)}")


def is_installed(module: str) -> bool:
    """True if a module is installed. Its parent packages are imported, the module itself is not."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is not installed
        return False


def install_command(extra: str, package: Path = Path(__file__).parents[1]) -> str:
    """The shell command that adds an extra to the environment of this process. `package`: the folder of openm6, which
    lies in a clone of the project, beside its pyproject.toml, or in the environment's site-packages."""
    clone = package.parent
    if not (clone / "pyproject.toml").is_file():
        what = shlex.quote(f"openm6[{extra}]")
    else:
        where = "." if clone == Path.cwd() else str(clone)
        what = "-e " + shlex.quote(f"{where}[{extra}]")
    python = shlex.quote(sys.executable)
    if not is_installed("pip"):  # an environment made by uv
        return f"uv pip install --python {python} {what}"
    pip = shutil.which("pip")
    same = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return f"{'pip' if same else f'{python} -m pip'} install {what}"
