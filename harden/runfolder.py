"""The run folder: what is kept, so that a run can be stopped at any moment and started again.

Each stage's result is a file under state/, written whole or not at all. A stage whose file exists is not run again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from harden import processes
from harden.errors import HardenError
from harden.files import write_atomically
from harden.recipe import Recipe

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

Part = Literal["attack", "certificate", "locators"]  # such a run has its own folder inside the run folder
BARELY_BEGUN = {".recipe.yaml.part"}  # all that a run leaves which is killed while it makes its folder


class RunFolder:
    """The folder of a recipe, looked at now and made by `create`.

    Raises HardenError when the folder belongs to another recipe (naming the first key that differs), or is no run
    folder and not empty: nothing in it is ever overwritten.

    part: a run of the recipe that works in a folder of that name inside.
    """

    def __init__(self, recipe: Recipe, part: Part | None = None):
        self.recipe = recipe
        self.outer = Path(recipe.output)
        self.path = self.outer / part if part else self.outer
        self.state = self.path / "state"
        self.saved_recipe = self.path / "recipe.yaml"
        self.lock = FileLock(self.state / ".lock")
        self._inside: list[float] = []  # of each stage that is under way: seconds that stages inside it took
        processes.from_main(self._check)

    def _check(self) -> None:
        if self.saved_recipe.exists():
            saved = yaml.safe_load(self.saved_recipe.read_text(encoding="utf-8"))
            difference = _first_difference(saved, self.recipe)
            if difference:
                raise HardenError(
                    f"{self.path} holds a run of another recipe ({difference}); give another --output, "
                    "or the same recipe to resume"
                )
        else:
            for path in {self.outer, self.path}:
                self._check_new(path)

    def _check_new(self, path: Path) -> None:
        if not path.exists() or (path / "recipe.yaml").exists():
            return
        inside = {p.name for p in path.iterdir()} if path.is_dir() else {path.name}
        allowed = {*BARELY_BEGUN, *get_args(Part)}
        if inside & set(get_args(Part)):
            allowed.add("report.html")  # of these runs
        if inside - allowed:
            raise HardenError(f"{path} exists and is no run folder; give another --output")

    def warn_of_another_model(self) -> None:
        """Say so where a part measures another model than the one that was trained in the same folder."""
        model, trained = self.recipe.model, self.outer / "adapter"
        made = {trained.resolve(), (self.outer / "model").resolve()}
        if trained.is_dir() and not made & {Path(path).resolve() for path in (model.name, model.adapter) if path}:
            logger.warning(
                "the model measured here is not the one trained in this folder; to measure that one give "
                "--model.adapter %s, else give another --output",
                trained,
            )

    def create(self) -> None:
        """Make the folder and write the recipe into it, unless that was done before; lock it until the process ends.

        Raises HardenError while another process works in it: a launcher that was killed may have left one behind.
        """
        processes.from_main(self._create)

    def _create(self) -> None:
        try:
            begun = self.saved_recipe.exists()
            if not begun:
                write_atomically(self.saved_recipe, self.recipe.to_yaml())
            self.state.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            if begun:
                logger.info("%s was begun before and goes on", self.path)
        except Timeout:
            raise HardenError(f"another process is running in {self.path}; wait for it, or stop it") from None
        except OSError as error:
            raise HardenError(f"cannot write the run folder {self.path}: {error}") from None

    def stage(self, name: str, kind: type[Value], make: Callable[[], Value]) -> Value:
        """The saved result of stage `name`, or `make()`, saved. All processes get the same value.

        Raises HardenError where what is saved is no such result.
        """
        path = self.state / f"{name}.json"
        adapter = TypeAdapter(kind)
        saved = self._saved_text(name)
        if saved is not None:
            return self._read(name, adapter, saved)
        began = time.monotonic()
        self._inside.append(0.0)
        try:
            value = make()
        finally:
            inside, elapsed = self._inside.pop(), time.monotonic() - began
        if self._inside:
            self._inside[-1] += elapsed
        seconds = round(elapsed - inside, 2)  # stages inside log their own
        text = processes.from_main(lambda: adapter.dump_json(value).decode())
        if processes.is_main():
            write_atomically(path, text)
        self.log({"event": "stage", "stage": name, "seconds": seconds})
        processes.wait()
        return adapter.validate_json(text)  # what a resumed run would read

    def saved(self, name: str, kind: type[Value]) -> Value | None:
        """The saved result of stage `name`; None where it has not been made."""
        text = self._saved_text(name)
        return None if text is None else self._read(name, TypeAdapter(kind), text)

    def _read(self, name: str, adapter: TypeAdapter[Value], text: str) -> Value:
        try:
            return adapter.validate_json(text)
        except ValidationError as error:
            raise HardenError(
                f"{self.state / name}.json is damaged or of another version of harden "
                f"({' '.join(str(error).split())[:200]}); delete it to make it again, or give another --output"
            ) from None

    def _saved_text(self, name: str) -> str | None:
        path = self.state / f"{name}.json"
        return processes.from_main(lambda: path.read_text(encoding="utf-8") if path.exists() else None)

    def seconds(self) -> float:
        """Time that the finished stages took, over all sittings."""

        def total() -> float:
            path = self.path / "log.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            events = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut a line short
            return sum(event["seconds"] for event in events if event["event"] == "stage")

        return processes.from_main(total)

    def log(self, event: dict[str, Any]) -> None:
        """Append one event to log.jsonl."""
        if processes.is_main():
            with (self.path / "log.jsonl").open("a+b") as file:
                if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                    file.write(b"\n")  # a kill cut the last line short
                file.write(json.dumps({"time": round(time.time(), 3), **event}).encode() + b"\n")


MAY_DIFFER = {"output", "generation.batch_size"}  # where it lies, and what changes no more than rounding


def _first_difference(saved: Any, recipe: Recipe) -> str | None:
    old, new = _flat(saved), _flat(recipe.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if key not in MAY_DIFFER and old.get(key) != new.get(key):
            was, now = (json.dumps(flat.get(key), ensure_ascii=False) for flat in (old, new))
            return f"{key} was {was}, now {now}"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
