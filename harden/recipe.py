"""The recipe: one typed schema for a run, read from YAML with dotted overrides from the command line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from harden.errors import HardenError
from harden.schema import Section, merge, nearest_key, read_mapping, validated
from harden.settings.measuring import (
    AttackSection,
    CertifySection,
    GenerationSection,
    JudgeSection,
    LocateSection,
    ModelSection,
    PromptsSection,
    RefusalSection,
    SuiteSection,
)
from harden.settings.training import RoundsSection, SaveSection, TrainSection

PROGRAM_OPTIONS = ("config", "print-config", "help-keys")  # beside the keys of the recipe
OPTIONS_OF_OTHERS = {"keep-completions": "harden attack", "sample": "harden certify"}


class Recipe(Section):
    name: str
    """Heads the report and the model card."""
    output: str
    """Run folder."""
    seed: int = 0
    """Seeds everything that is drawn; where `prompts.split_seed` is null the prompts are divided by it, too."""
    model: ModelSection
    prompts: PromptsSection = PromptsSection()
    refusal: RefusalSection = RefusalSection()
    generation: GenerationSection = GenerationSection()
    judge: JudgeSection = JudgeSection()
    locate: LocateSection = LocateSection()
    attack: AttackSection = AttackSection()
    suite: SuiteSection = SuiteSection()
    certify: CertifySection = CertifySection()
    train: TrainSection = TrainSection()
    rounds: RoundsSection = RoundsSection()
    save: SaveSection = SaveSection()

    def division(self) -> tuple[dict[str, dict[str, Any]], float, float, int]:
        """How the prompts are divided: what `load_splits` takes."""
        prompts = self.prompts
        kinds = ("harmful", "twins", "more_twins", "benign")
        sources = {kind: source.model_dump() for kind in kinds if (source := getattr(prompts, kind)) is not None}
        seed = self.seed if prompts.split_seed is None else prompts.split_seed
        return sources, prompts.train_share, prompts.selection_share, seed

    @property
    def seeds(self) -> str:
        """The seed, and that of the prompts' division where it is another, for readers."""
        _, _, _, division = self.division()
        return f"seed {self.seed}" + (f", prompts divided by {division}" if division != self.seed else "")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file and lay `overrides` (nested dicts) over it.

    A relative path in the file that exists beside the file is meant relative to it. A file may begin with `base:`,
    another recipe that it is laid over. Raises HardenError with every problem found: a missing file, bad YAML, unknown
    keys (with the nearest known key), wrong types.
    """
    path = Path(path)
    data = _read(path, ())
    if "suite_version" in data:
        raise HardenError(f"{path} is a policy, not a recipe: harden gate --policy {path}")
    label = f"recipe {path}{' with the options given' if overrides else ''}"
    return validated(Recipe, merge(data, overrides or {}), label)


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a recipe file over those of its base. above: the files that led here."""
    data, place = read_mapping(path, "recipe"), path.resolve()
    base = data.pop("base", None)
    data = resolve_paths(data, place.parent)
    if base is None:
        return data
    if not isinstance(base, str):
        raise HardenError(f"recipe {path}: base is {base!r}, and must be the path of a recipe")
    if (place.parent / base).resolve() in (*above, place):
        raise HardenError(f"recipe {path}: its base {base} leads back to it")
    return merge(_read(place.parent / base, (*above, place)), data)


def read_overrides(arguments: list[str], program: str) -> dict[str, Any]:
    """Parse `--train.learning_rate 1e-4 ...` into nested dicts.

    Items of a list may be quoted as in YAML: `--attack.neurons "['24:623']"`.
    """

    class Base(BaseSettings):
        model_config = SettingsConfigDict(
            extra="forbid",
            cli_prog_name=program,
            cli_hide_none_type=True,
            cli_parse_none_str="null",
            cli_avoid_json=True,
            use_attribute_docstrings=True,
            protected_namespaces=(),
        )

    fields = {name: (field.annotation, field) for name, field in Recipe.model_fields.items()}
    options = create_model("Overrides", __base__=Base, **fields)
    quoted = re.compile(r"(?<=[\[,])(\s*)'([^'\"]*)'(?=\s*[,\]])")  # an item of a list, whole
    arguments = [text if '"' in text else quoted.sub(r'\1"\2"', text) for text in arguments]
    try:
        return CliSettingsSource(options, cli_parse_args=arguments, cli_exit_on_error=False)()
    except SettingsError as error:
        raise HardenError(_explain_arguments(str(error))) from None


def _explain_arguments(message: str) -> str:
    stray = re.search(r"unrecognized arguments: (?!--)(\S+)", message)
    if stray:
        return f"'{stray[1]}' belongs to no option; options begin with --"
    unknown = re.search(r"unrecognized arguments: --([\w.-]+)", message)
    if unknown is None:
        section = re.search(r'error parsing value for field "([\w.]+)"', message)
        if section:
            return f"cannot read an option of '{section[1]}': give sections key by key: --train.lora.rank 8"
        return " ".join(message.split())
    if unknown[1] == "base":
        return "'base' stands in a recipe and is no option"
    if unknown[1] in OPTIONS_OF_OTHERS:
        return f"'--{unknown[1]}' is an option of {OPTIONS_OF_OTHERS[unknown[1]]} alone"
    of_program = difflib.get_close_matches(unknown[1], PROGRAM_OPTIONS, 1)
    nearest = of_program[0] if of_program else nearest_key(unknown[1], Recipe)
    return f"unknown option '--{unknown[1]}'" + (f"; did you mean '--{nearest}'?" if nearest else "")


def resolve_paths(data: Any, folder: Path, key: str = "") -> Any:
    """Make models, adapters and prompt files that exist beside the recipe absolute; leave everything else."""
    if isinstance(data, dict):
        return {name: resolve_paths(value, folder, f"{key}.{name}") for name, value in data.items()}
    if (
        key.endswith((".model.name", ".adapter", ".path", ".judge.reference"))
        and isinstance(data, str)
        and (folder / data).exists()
    ):
        return str(folder / data)
    return data
