"""The evidence of a gate, read by other tools: each format by its own validator; and signatures."""

import json
import shutil
import subprocess
import sys

import jsonschema
import junitparser
import pytest
import yaml
from conftest import ROOT
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.json_format import ParseDict
from huggingface_hub import ModelCard, parse_eval_result_entries
from in_toto_attestation.predicates.test_result.v0 import test_result_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from test_gate import BREAKING, BUDGET, PASSING

from harden.gate import sign, verify
from harden.gate.command import main
from harden.planted import save_planted_model
from harden.report.command import main as report


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A folder with a gate that passed and one that failed, the model, and two pairs of keys."""
    folder = tmp_path_factory.mktemp("evidence")
    for name in ("model", "reference"):
        (folder / name).mkdir()
        save_planted_model(folder / name)
    (folder / "reference/model.safetensors").touch()
    for name, budget in (("passed", BUDGET), ("failed", {**BUDGET, **BREAKING})):
        policy = {
            "name": name, "description": "a test", "suite_version": 1, "thresholds": PASSING, "budget": budget,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(policy))
        options = {
            "model": folder / "model", "reference": folder / "reference", "policy": folder / f"{name}.yaml",
            "output": folder / name,
        }  # fmt: skip
        assert main([str(x) for o, value in options.items() for x in (f"--{o}", value)]) == (name == "failed")
    for name in ("mine", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private, public = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, private, plain))
        (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(pem, public))
    return folder


@pytest.fixture
def signed(gated, tmp_path):
    """A copy of it all, with the gate that passed signed."""
    folder = tmp_path / "signed"
    shutil.copytree(gated, folder)
    assert signing(folder) == 0
    return folder


def signing(folder, gate="passed", key="mine.pem"):
    return sign.main([str(folder / gate), "--model", str(folder / "model"), "--key", str(folder / key)])


def verifying(folder, key="mine.pub"):
    return verify.main([str(folder / "passed"), "--model", str(folder / "model"), "--key", str(folder / key)])


# -- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["passed", "failed"])
def test_records_fit_their_published_schemas(gated, gate):
    for name, schema in (("results.json", "gate"), ("verdict.json", "verdict"), ("attack/attack.json", "attack")):
        rules = json.loads((ROOT / f"docs/{schema}.schema.json").read_text())
        jsonschema.Draft202012Validator.check_schema(rules)
        path = gated / gate / name
        if path.exists():  # a gate that has failed stops attacking
            jsonschema.validate(json.loads(path.read_text()), rules)


def test_junit_reads_each_threshold_as_a_test(gated):
    passed, failed = (junitparser.JUnitXml.fromfile(str(gated / gate / "junit.xml")) for gate in ("passed", "failed"))
    assert (passed.tests, passed.failures, passed.errors) == (3, 0, 0)
    assert (failed.tests, failed.failures) == (3, 1)
    cases = [case for suite in failed for case in suite]
    assert [case.name for case in cases if not case.is_passed] == ["worst_neuron_lift"]


def test_the_statement_is_in_toto(gated):
    content = json.loads((gated / "passed/attestation.json").read_text())
    statement = Statement.copy_from_pb(ParseDict(content, statement_pb2.Statement()))
    statement.validate()
    ParseDict(content["predicate"], test_result_pb2.TestResult(), ignore_unknown_fields=True)  # as in-toto asks


def test_the_hub_reads_card_and_results(gated):
    card = ModelCard.load(gated / "passed/model-card.md")
    card.validate = None  # it would ask the hub
    by_task = {result.metric_type: result for result in card.data.eval_results}
    assert by_task["constant_success"].metric_value == 0.0 and by_task["no_attack_refusal"].metric_value == 1.0
    assert "## Release gate: PASSED" in card.text and "worst_neuron_lift" in card.text
    entries = parse_eval_result_entries(yaml.safe_load((gated / "failed/eval_results.yaml").read_text()))
    values = {entry.task_id: entry for entry in entries}
    assert values["constant_success"].value == 1.0 and "n=40" in values["constant_success"].notes
    assert {entry.dataset_id for entry in entries} == {"local-prompts"} and str(gated) not in str(entries)


def test_the_environment_says_what_ran_where(gated):
    found = json.loads((gated / "passed/environment.json").read_text())
    assert found["seed"] == 0 and found["python"] == sys.version.split()[0]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert (found["git"] or {}).get("commit", "") == commit


def test_the_report_is_part_of_the_evidence(gated, tmp_path, capsys):
    shutil.copytree(gated, tmp_path / "copy")
    page = tmp_path / "copy/passed/report.html"
    assert "PASSED by policy passed" in page.read_text()
    assert report([str(tmp_path / "copy/passed")]) == 0  # the same page
    assert report([str(tmp_path / "copy/passed"), "--texts"]) == 2
    assert "part of a gate's evidence" in capsys.readouterr().err
    page.write_text(page.read_text().replace("PASSED", "SPLENDID"))
    assert verify.main([str(tmp_path / "copy/passed"), "--model", str(gated / "model")]) == 1


# -- signatures ------------------------------------------------------------------------------------------------------


def test_what_was_signed_is_verified_by_harden_and_by_the_formats_own_tool(signed, capsys):
    assert verifying(signed) == 0 and "signed with this key" in capsys.readouterr().out
    tool = [sys.executable, "-m", "model_signing", "verify", "key", "--public_key", signed / "mine.pub"]
    done = subprocess.run(
        [*tool, "--signature", signed / "passed/model.sig", signed / "model"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: shutil.copy(f / "other.pub", f / "mine.pub"), "model.sig does not fit this key"),
        (lambda f: (f / "passed/attestation.sig").unlink(), "there is no attestation.sig"),
        (lambda f: (f / "passed/model.sig").write_text("{}"), "model.sig does not fit"),
        (lambda f: (f / "model/config.json").write_text("{}"), "model/config.json has changed"),
        (lambda f: (f / "passed/attestation.json").write_text(
            (f / "passed/attestation.json").read_text() + " "), "attestation.sig does not fit"),
    ],
)  # fmt: skip
def test_what_was_changed_after_signing_is_found(signed, capsys, change, said):
    change(signed)
    assert verifying(signed) == 1 and said in capsys.readouterr().err


def test_a_failed_gate_is_not_signed(gated, capsys):
    assert signing(gated, gate="failed") == 1 and "only a pass is signed" in capsys.readouterr().err
    assert not (gated / "failed/model.sig").exists()


@pytest.mark.parametrize("key", ["missing.pem", "mine.pub", "passed.yaml"])
def test_a_key_that_is_none_is_one_line(gated, capsys, key):
    assert signing(gated, key=key) == 2
    error = capsys.readouterr().err
    assert key in error and "Traceback" not in error and not list((gated / "passed").glob("*.sig"))
    if key != "mine.pub":
        assert verifying(gated, key) == 2 and key in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(gated, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert signing(gated) == 2 and "harden[sign]" in capsys.readouterr().err
