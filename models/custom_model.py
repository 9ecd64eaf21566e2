"""Custom models: Python files or modules outside this repository that register models with timm (docs/extending.md)."""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType

import timm
from timm.models import model_entrypoint


def import_models(where: str, key: str = "MODEL.MODULE") -> tuple[str, list[str]]:
    """Import a file ("mine/net.py") or a module ("package.net"), once; return its file and the models it registers.

    Raises ValueError, naming `key`, if it cannot be imported, registers no model, or takes the name of another one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Overwriting")  # timm's warning about a name that another model has
        try:
            module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        except Exception as error:
            raise ValueError(f"{key}={where!r} cannot be imported: {_describe(error)}") from error
    own = [name for name in timm.list_models() if _is_from(model_entrypoint(name).__module__, module.__name__)]
    if not own:
        raise ValueError(f"{key}={where!r} registers no model; put timm's @register_model before a function in it")
    return str(module.__file__), own


def describe_module(where: str) -> str:
    """Return the file that `import_models` would run, with its SHA-256 where it is a file, as text; nothing is imported."""
    if not where.endswith(".py"):
        found = None
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(where.partition(".")[0])  # of a submodule, it would import the package
        return f"the module {where}" + (f" of {found.origin}" if found and found.origin else "")
    path = Path(where).expanduser().resolve()
    return f"{path} (SHA-256 {digest(str(path))})" if path.is_file() else str(path)


def digest(file: str) -> str:
    """Return the SHA-256 of a file, which the manifest records to tell versions apart."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name unique to its path, so that it runs once."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    name = f"{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # timm looks it up there during its execution
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_from(module: str, own: str) -> bool:
    return module == own or module.startswith(f"{own}.")


def _describe(error: Exception) -> str:
    """Return an error's type and message, and its line in the user's file rather than in a library."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not frame.filename.startswith("<") and "site-packages" not in frame.filename]
    location = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{'' if isinstance(error, SyntaxError) else location}"
