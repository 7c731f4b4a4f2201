"""Files and folders that are whole or absent, and records that are read back from them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from harden.errors import HardenError

Model = TypeVar("Model", bound=BaseModel)


def read_finished(path: Path, kind: type[Model]) -> Model:
    """The record of a finished run; HardenError if it cannot be read as one."""
    if not path.is_file():
        raise HardenError(f"there is no file {path}")
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
    raise HardenError(
        f"{path} is something else, damaged, or of another version of harden ({reason}); make it again, or use the "
        "version that wrote it"
    )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or absent, even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder so that it is whole or absent. write: fills the folder that it is given."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    mode = next(part.glob("*.json")).stat().st_mode
    for weights in part.glob("*.safetensors"):  # which the library leaves to its owner alone
        weights.chmod(mode)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
