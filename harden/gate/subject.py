"""What a verdict is about: the files of a model and of its adapter, each with its digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from harden import bundled
from harden.errors import HardenError


def subject_files(model: str, adapter: str | None) -> dict[str, str]:
    """sha256 of every file that is not hidden, by `model/<path>` and `adapter/<path>`.

    Raises HardenError where there is no such model, or it has no file of weights.
    """
    found = _digests("model", model)
    if adapter:
        found |= _digests("adapter", adapter)
    return found


def model_folder(label: str, name: str) -> Path:
    """The folder of a model or an adapter: bundled, local, or fetched from the hub. Raises HardenError without one."""
    folder = Path(str(bundled.resolve(name)) if label == "model" else name)
    return folder if folder.is_dir() else _fetched(label, name)


def _digests(label: str, name: str) -> dict[str, str]:
    folder = model_folder(label, name)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    visible = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not any(path.suffix in (".safetensors", ".bin", ".gguf") for path in visible):
        raise HardenError(f"{label} '{name}': {folder} holds no weights (.safetensors, .bin or .gguf)")
    if label == "model" and not (folder / "config.json").is_file():
        raise HardenError(f"model '{name}': {folder} has no config.json; an adapter alone is given by --adapter")
    try:
        return {f"{label}/{path.relative_to(folder).as_posix()}": _sha256(path) for path in visible}
    except OSError as error:
        raise HardenError(f"{label} '{name}': cannot read its files ({error})") from None


def _fetched(label: str, name: str) -> Path:
    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HardenError(
            f"{label} '{name}' is neither bundled, nor a folder, nor a hub id that can be fetched ({reason})"
        ) from None


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()
