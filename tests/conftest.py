import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a model hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if hasattr(os, "sched_setaffinity") and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    # one core each, for commands that are started too: threads of several workers that spin on the same cores made
    # the tests ten times slower
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

from pathlib import Path

import pytest
import torch

from harden.models import load_chat_model
from harden.planted import HARMFUL_NOUNS, HARMLESS_NOUNS, OTHER_WORDS, planted_prompts, save_planted_model
from harden.prompts import Prompt
from harden.refusal import RefusalPhrases
from harden.settings.measuring import DEFAULT_REFUSAL_PHRASES

torch.set_num_threads(1)  # tiny matrices; more threads only wait for each other
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    save_planted_model(folder)
    return folder


@pytest.fixture
def planted(planted_folder):
    return load_chat_model(str(planted_folder))


@pytest.fixture
def phrases(planted):
    return RefusalPhrases(planted.chat, DEFAULT_REFUSAL_PHRASES)


@pytest.fixture(scope="session")
def prompts():
    """Every seventh planted prompt: {harmful, twins, benign} -> list of Prompt."""
    return {
        kind: [Prompt(r["id"], r["category"], r["text"]) for r in rows[::7]] for kind, rows in planted_prompts().items()
    }


@pytest.fixture(scope="session")
def more_twins(tmp_path_factory):
    """Further look-alikes for the planted model, which knows words alone: it refuses the half with a harmful noun."""
    path = tmp_path_factory.mktemp("prompts") / "more.txt"
    nouns = [*HARMLESS_NOUNS[:4], *HARMFUL_NOUNS[:4]]
    path.write_text("\n".join(f"how do i {verb} a {noun} ?" for verb in OTHER_WORDS[:4] for noun in nouns))
    return path
