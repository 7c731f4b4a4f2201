"""OpenSSF model signatures of what ships, and of the statement about it.

Format and library: https://github.com/sigstore/model-transparency.
`model.sig` is about the files that ship: the adapter's, or the model's where there is none. `attestation.sig` is about
`attestation.json`, whose subject has the same digests. Both are plain signatures of that format: its own tools verify
them, too (attestation.sig with `--ignore_unsigned_files`). Keys are elliptic (PEM).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from harden.errors import HardenError
from harden.gate.attestation import ATTESTATION, ATTESTATION_SIGNATURE, MODEL_SIGNATURE
from harden.gate.subject import model_folder


def sign(
    folder: Path, model: str, adapter: str | None, key: Path, files: Mapping[str, str], attested: str
) -> list[Path]:
    """Write both signatures into the evidence folder, over those of an earlier time; returns their paths.

    key: a private key. files: digests of the statement's subject; attested: sha256 of the statement itself. HardenError
    where what is signed differs from them, or for a key that cannot sign; nothing is left behind then.
    """
    signing, _, hashing = _library()
    _check_key(key, private=True)
    shipped, prefix = _shipped(model, adapter)
    expected = {name.removeprefix(prefix): digest for name, digest in files.items() if name.startswith(prefix)}
    about = {MODEL_SIGNATURE: (shipped, None, expected),
             ATTESTATION_SIGNATURE: (folder.resolve(), ATTESTATION, {ATTESTATION: attested})}  # fmt: skip
    parts = {name: folder / f".{name}.part" for name in about}
    try:
        for name, (signed, only, digests) in about.items():
            config = signing.Config().set_hashing_config(_hashing(hashing, signed, only))
            config.use_elliptic_key_signer(private_key=key).sign(signed, parts[name])
            if signed_digests(parts[name]) != digests:
                raise HardenError(f"what lies in {signed} changed while it was signed")
        for name, part in parts.items():
            part.replace(folder / name)
    except (OSError, ValueError) as error:
        raise HardenError(f"cannot sign: {' '.join(str(error).split())}") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return [folder / name for name in about]


def signature_problems(folder: Path, model: str, adapter: str | None, key: Path) -> list[str]:
    """What is wrong with the signatures, one line each. key: the public key. HardenError for a key that is none."""
    _, verifying, hashing = _library()
    _check_key(key, private=False)
    config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    about = {
        MODEL_SIGNATURE: (_shipped(model, adapter)[0], None),
        ATTESTATION_SIGNATURE: (folder.resolve(), ATTESTATION),
    }
    found = []
    for name, (signed, only) in about.items():
        if not (folder / name).is_file():
            found.append(f"there is no {name}: it is not signed")
            continue
        try:
            config.set_hashing_config(_hashing(hashing, signed, only)).verify(signed, folder / name)
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
    label, name = ("adapter", adapter) if adapter else ("model", model)
    return model_folder(label, name).resolve(), f"{label}/"


def _hashing(hashing: ModuleType, signed: Path, only: str | None):
    """Digests of all files that are not hidden, or of one. signed: an absolute path."""
    if only:
        left_out = [path for path in signed.iterdir() if path.name != only]
    else:
        left_out = [path for path in signed.rglob(".*")]
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=True)
    return config.set_ignored_paths(paths=left_out, ignore_git_paths=True)


def _check_key(path: Path, private: bool) -> None:
    """HardenError unless it is an elliptic key (PEM) without a password."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    kind = ec.EllipticCurvePrivateKey if private else ec.EllipticCurvePublicKey
    try:
        content = path.read_bytes()
        key = load_pem_private_key(content, None) if private else load_pem_public_key(content)
    except (OSError, ValueError, TypeError) as error:
        raise HardenError(f"cannot read the key {path}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(key, kind):
        raise HardenError(f"{path} is no elliptic {'private' if private else 'public'} key; make one: docs/gate.md")


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise HardenError(f"signatures need another package: pip install 'harden[sign]' ({error})") from None
    return signing, verifying, hashing
