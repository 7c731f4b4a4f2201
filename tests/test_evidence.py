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
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from google.protobuf.json_format import ParseDict
from huggingface_hub import ModelCard, parse_eval_result_entries
from in_toto_attestation.predicates.test_result.v0 import test_result_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from test_gate import BREAKING, BUDGET, PASSING

from harden.adapters import attach_adapter, save_adapter
from harden.gate import sign, signatures, verify
from harden.gate.command import main
from harden.gate.signatures import signed_digests
from harden.models import load_chat_model
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
            "name": name, "description": "a test", "suite_version": 4, "thresholds": PASSING, "budget": budget,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(policy))
        options = {
            "model": folder / "model", "reference": folder / "reference", "policy": folder / f"{name}.yaml",
            "output": folder / name,
        }  # fmt: skip
        assert main([str(x) for o, value in options.items() for x in (f"--{o}", value)]) == (name == "failed")
    keys = {"mine": ec.generate_private_key(ec.SECP256R1()), "other": ec.generate_private_key(ec.SECP256R1())}
    keys["rsa"] = rsa.generate_private_key(65537, 2048)
    for name, key in keys.items():
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
    by_task = {result.metric_type: result for result in card.data.eval_results}
    assert by_task["constant_success"].metric_value == 0.0 and by_task["no_attack_refusal"].metric_value == 1.0
    assert "## Release gate: PASSED" in card.text and "worst_neuron_lift" in card.text
    entries = parse_eval_result_entries(yaml.safe_load((gated / "failed/eval_results.yaml").read_text()))
    values = {entry.task_id: entry for entry in entries}
    assert values["constant_success"].value == 1.0 and "n=40" in values["constant_success"].notes
    assert {entry.dataset_id for entry in entries} == {"local-prompts"} and str(gated) not in str(entries)
    digest = json.loads((gated / "failed/results.json").read_text())["prompts"]
    assert all(digest in entry.notes for entry in entries)


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


def test_a_folder_may_be_given_by_any_path(gated, tmp_path, monkeypatch):
    shutil.copytree(gated, tmp_path / "copy")
    (tmp_path / "copy/model/.hidden").write_text("x")
    (tmp_path / "copy/passed/.gitkeep").touch()
    monkeypatch.chdir(tmp_path / "copy")
    relative = ["--model", "model", "--key"]
    assert sign.main(["passed", *relative, "mine.pem"]) == 0
    assert verify.main(["../copy/passed", *relative, "mine.pub"]) == 0 and verifying(tmp_path / "copy") == 0
    named = signed_digests(tmp_path / "copy/passed/attestation.sig")
    assert list(named) == ["attestation.json"]


def test_signing_with_a_wrong_key_leaves_the_old_signatures(signed):
    before = {path.name: path.read_bytes() for path in (signed / "passed").iterdir() if path.is_file()}
    assert signing(signed, key="rsa.pem") == signing(signed, key="missing.pem") == 2
    assert {path.name: path.read_bytes() for path in (signed / "passed").iterdir() if path.is_file()} == before
    assert signing(signed, key="other.pem") == 0 and verifying(signed, "other.pub") == 0


def test_a_statement_that_is_swapped_while_the_model_is_hashed_is_not_signed(gated, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(gated, folder)
    real = signatures._shipped

    def swap(*arguments):
        (folder / "passed/attestation.json").write_text("{}")
        return real(*arguments)

    monkeypatch.setattr(signatures, "_shipped", swap)
    assert signing(folder) == 2 and "changed while it was signed" in capsys.readouterr().err
    assert not list((folder / "passed").glob("*.sig*")) and not list((folder / "passed").glob(".*.part"))


def test_a_new_gate_takes_the_old_signatures_away(gated, signed):
    assert main([
        "--model", str(gated / "model"), "--reference", str(gated / "reference"),
        "--policy", str(gated / "passed.yaml"), "--output", str(signed / "passed"),
    ]) == 0  # fmt: skip
    assert not list((signed / "passed").glob("*.sig"))


def test_what_ships_is_the_adapter_where_there_is_one(gated, tmp_path):
    chat_model = load_chat_model(str(gated / "model"))
    attach_adapter(chat_model, 2, 4, ("all-linear",), None, 0)
    save_adapter(chat_model.model, tmp_path / "adapter")
    about = ["--model", str(gated / "model"), "--adapter", str(tmp_path / "adapter")]
    out = tmp_path / "out"
    assert main([*about, "--policy", str(gated / "passed.yaml"), "--output", str(out)]) == 0
    assert sign.main([str(out), *about, "--key", str(gated / "mine.pem")]) == 0
    assert set(signed_digests(out / "model.sig")) == {path.name for path in (tmp_path / "adapter").iterdir()}
    assert verify.main([str(out), *about, "--key", str(gated / "mine.pub")]) == 0
    (tmp_path / "adapter/more.txt").write_text("x")
    problems = signatures.signature_problems(out, about[1], about[3], gated / "mine.pub")
    assert len(problems) == 1 and problems[0].startswith("model.sig")


@pytest.mark.parametrize("key", ["missing.pem", "mine.pub", "passed.yaml", "rsa.pem"])
def test_a_key_that_is_none_is_one_line(gated, capsys, key):
    assert signing(gated, key=key) == 2
    error = capsys.readouterr().err
    assert key in error and "Traceback" not in error and not list((gated / "passed").glob("*.sig"))
    key = key.replace("rsa.pem", "rsa.pub")
    if key != "mine.pub":
        assert verifying(gated, key) == 2 and key in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(gated, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert signing(gated) == 2 and "harden[sign]" in capsys.readouterr().err
