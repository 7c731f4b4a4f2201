"""OpenSSF model signatures of what ships, and of the statement about it.

Format and library: https://github.com/sigstore/model-transparency.
`model.sig` is about the files that ship: the adapter's, or the model's where there is none. `attestation.sig` is about
`attestation.json`, whose subject has the same digests. Both are plain signatures of that format: its own tools verify
them, too. Keys are elliptic (PEM).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from harden.errors import HardenError
from harden.gate.attestation import ATTESTATION
from harden.gate.subject import model_folder

MODEL_SIGNATURE, ATTESTATION_SIGNATURE = "model.sig", "attestation.sig"


def sign(folder: Path, model: str, adapter: str | None, key: Path, files: Mapping[str, str]) -> list[Path]:
    """Write both signatures into the evidence folder; returns their paths.

    key: a private key. files: the digests of the statement's subject; HardenError where the signed ones differ.
    """
    signing, _, hashing = _library()
    shipped, label = _shipped(model, adapter)
    paths = []
    for signed, name in ((shipped, MODEL_SIGNATURE), (folder, ATTESTATION_SIGNATURE)):
        config = signing.Config().set_hashing_config(_hashing(hashing, signed, only=_only(signed, folder)))
        path = folder / name
        try:
            config.use_elliptic_key_signer(private_key=key).sign(signed, path)
        except (OSError, ValueError, TypeError) as error:
            path.unlink(missing_ok=True)
            raise HardenError(f"cannot sign with {key}: {' '.join(str(error).split())}") from None
        paths.append(path)
    expected = {name.removeprefix(label): digest for name, digest in files.items() if name.startswith(label)}
    if signed_digests(folder / MODEL_SIGNATURE) != expected:
        for path in paths:
            path.unlink()
        raise HardenError(f"the files of {shipped} changed while they were signed")
    return paths


def signature_problems(folder: Path, model: str, adapter: str | None, key: Path) -> list[str]:
    """What is wrong with the signatures, one line each. key: the public key. HardenError for a key that is none."""
    _, verifying, hashing = _library()
    shipped, _ = _shipped(model, adapter)
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise HardenError(f"cannot read the public key {key}: {' '.join(str(error).split())}") from None
    found = []
    for signed, name in ((shipped, MODEL_SIGNATURE), (folder, ATTESTATION_SIGNATURE)):
        if not (folder / name).is_file():
            found.append(f"there is no {name}: it is not signed")
            continue
        try:
            hashed = _hashing(hashing, signed, only=_only(signed, folder))
            config.set_hashing_config(hashed).verify(signed, folder / name)
        except Exception as error:  # the library's own are of many kinds; anything but success is no signature
            found.append(f"{name} does not fit this key and these files ({' '.join(str(error).split())[:200]})")
    return found


def signed_digests(signature: Path) -> dict[str, str]:
    """sha256 by file name, as a signature states them; whether it is valid is another question."""
    envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
    predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    return {entry["name"]: entry["digest"] for entry in predicate["resources"]}


def _shipped(model: str, adapter: str | None) -> tuple[Path, str]:
    """The folder that ships, and the prefix of its files in the statement."""
    return (model_folder("adapter", adapter), "adapter/") if adapter else (model_folder("model", model), "model/")


def _only(signed: Path, folder: Path) -> str | None:
    return ATTESTATION if signed == folder else None


def _hashing(hashing: ModuleType, signed: Path, only: str | None):
    """Digests of all files that are not hidden, or of one."""
    left_out = [p for p in signed.iterdir() if (p.name != only if only else p.name.startswith("."))]
    left_out += [] if only else [p for p in signed.rglob("*/.*")]
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=True)
    return config.set_ignored_paths(paths=left_out, ignore_git_paths=True)


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise HardenError(f"signatures need another package: pip install 'harden[sign]' ({error})") from None
    return signing, verifying, hashing
