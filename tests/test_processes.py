import os
from types import SimpleNamespace

import pytest
import torch

from harden import processes


@pytest.fixture
def cores(monkeypatch):
    """Seven cores, of which torch uses five; what the tests run on is put back."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "state", lambda: SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    torch.set_num_threads(5)
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 7),
        ({"OMP_NUM_THREADS": "1"}, 5),
        ({"OMP_NUM_THREADS": "2"}, 5),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 7),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 3),
        ({"OMP_NUM_THREADS": "4", "LOCAL_WORLD_SIZE": "2"}, 5),
    ],
)
def test_what_the_user_asks_for_is_respected_and_what_a_launcher_sets_is_not(cores, environment, threads):
    for name, value in environment.items():
        cores.setenv(name, value)
    processes.use_all_cores()
    assert torch.get_num_threads() == threads
