"""What a verdict is about: the files of a model and of its adapter, each with its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from harden import bundled
from harden.errors import HardenError

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
CACHES = (".git/", ".cache/")  # nothing loads weights from there


def subject_files(model: str, adapter: str | None) -> dict[str, str]:
    """sha256 of every file that is not hidden, by `model/<path>` and `adapter/<path>`.

    Raises HardenError where there is no such model, it has no file of weights, or weights may lie where no digest is
    taken: in hidden files, behind links to folders or outside.
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
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_symlink() and path.is_dir():
            raise HardenError(f"{label} '{name}': {path} links to a folder; its files could change unseen")
    files = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    visible = {file: path for file, path in files.items() if not any(part.startswith(".") for part in file.split("/"))}
    hidden = next((file for file in sorted(files.keys() - visible.keys()) if file.endswith(WEIGHTS)), None)
    if hidden and not hidden.startswith(CACHES):
        raise HardenError(f"{label} '{name}': {hidden} holds weights and is hidden; hidden files have no digest")
    if not any(file.endswith(WEIGHTS) for file in visible):
        raise HardenError(f"{label} '{name}': {folder} holds no weights (.safetensors, .bin or .gguf)")
    if label == "model" and "config.json" not in visible:
        raise HardenError(f"model '{name}': {folder} has no config.json; an adapter alone is given by --adapter")
    if label == "adapter" and "adapter_config.json" not in visible:
        raise HardenError(f"adapter '{name}': {folder} has no adapter_config.json")
    try:
        for file, path in visible.items():
            if file.endswith(".index.json"):
                _check_index(f"{label} '{name}': {file}", path, visible)
        return {f"{label}/{file}": _sha256(path) for file, path in visible.items()}
    except OSError as error:
        raise HardenError(f"{label} '{name}': cannot read its files ({error})") from None


def _check_index(described: str, path: Path, visible: Mapping[str, Path]) -> None:
    """HardenError where an index of sharded weights names a file that has no digest."""
    try:
        named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HardenError(f"{described} is no index of weights") from None
    beside = {other.relative_to(path.parent).as_posix() for other in visible.values() if path.parent in other.parents}
    if unseen := sorted(map(str, named - beside)):
        raise HardenError(f"{described} names {unseen[0]}, which is not among the model's visible files")


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
