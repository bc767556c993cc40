"""Licence, SBOM, digests of base images, the user of the images, and a package with a known vulnerability."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from aer_megatron.config_loading import load_config
from tools import check_image_pins, pin_images, sbom

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bom(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("sbom") / "sbom.json"
    assert sbom.main(["--output", str(file), "--licences", str(file.with_suffix(".md"))]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    table = file.with_suffix(".md").read_text().splitlines()
    assert len(table) == len(found["components"]) + 2
    return found


def reachable(name: str, extras: frozenset[str], seen: dict[str, metadata.Distribution]) -> None:
    """An independent walk: depth first over importlib.metadata, without the tool's own functions."""
    distribution = metadata.distribution(name)
    key = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
    if key in seen and not extras:
        return
    seen[key] = distribution
    for requirement in map(Requirement, distribution.requires or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or any(marker.evaluate({"extra": e}) for e in extras):
            reachable(requirement.name, frozenset(requirement.extras), seen)


def test_the_sbom_lists_every_package_that_is_needed(bom: dict[str, Any]) -> None:
    expected: dict[str, metadata.Distribution] = {}
    reachable("aer-megatron", frozenset(), expected)
    own = expected.pop("aer-megatron")
    installed = [item for item in bom["components"] if item["purl"].startswith("pkg:pypi/")]
    assert {item["name"]: item["version"] for item in installed} == {
        name: distribution.version for name, distribution in expected.items()
    }
    assert len(expected) > 40
    assert bom["metadata"]["component"]["version"] == own.version
    for item in installed:
        assert item["purl"] == f"pkg:pypi/{item['name']}@{item['version'].replace('+', '%2B')}"
        assert sbom.licence_text(item["licenses"][0]).strip()
    unstated = [item["name"] for item in bom["components"] if sbom.licence_text(item["licenses"][0]) == "not stated"]
    assert len(unstated) <= 2, unstated


def test_the_sbom_has_the_form_of_cyclonedx(bom: dict[str, Any]) -> None:
    assert (bom["bomFormat"], bom["specVersion"], bom["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bom["serialNumber"])
    assert set(bom) == {
        *("$schema", "bomFormat", "specVersion", "serialNumber", "version"),
        *("metadata", "components", "dependencies"),
    }
    references = [item["bom-ref"] for item in bom["components"]]
    assert len(set(references)) == len(references)
    for item in bom["components"]:
        assert set(item) - {"scope"} == {"type", "bom-ref", "name", "version", "licenses", "purl"}
        (entry,) = item["licenses"]
        assert set(entry) == {"expression"} or set(entry["license"]) == {"name"}
    known = {*references, bom["metadata"]["component"]["bom-ref"]}
    assert {item["ref"] for item in bom["dependencies"]} == known
    assert all(set(item["dependsOn"]) <= known for item in bom["dependencies"])


def test_the_sbom_and_the_notice_name_what_the_repository_holds_of_others(bom: dict[str, Any]) -> None:
    header = (ROOT / "cpp/third_party/doctest/doctest.h").read_text()
    numbers = re.findall(r"^#define DOCTEST_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", header, re.MULTILINE)
    (doctest,) = [item for item in bom["components"] if item.get("scope") == "excluded"]
    assert (doctest["name"], doctest["version"]) == ("doctest", ".".join(numbers))
    assert doctest["licenses"] == [{"expression": "MIT"}]
    licence = (ROOT / "cpp/third_party/doctest/LICENSE.txt").read_text()
    copyright_line = next(line for line in licence.splitlines() if line.startswith("Copyright"))
    notice = (ROOT / "NOTICE").read_text()
    assert "The MIT License (MIT)" in licence
    assert f"doctest {doctest['version']} (cpp/third_party/doctest" in notice and copyright_line in notice
    assets = ROOT / "aer_megatron/report/assets"
    (uplot,) = [item for item in bom["components"] if item["name"] == "uplot"]
    assert f"(v{uplot['version']})" in (assets / "uPlot.iife.min.js").read_text()[:200]
    copyright_line = next(line for line in (assets / "uPlot.LICENSE").read_text().splitlines() if "Copyright" in line)
    assert f"uPlot {uplot['version']} (aer_megatron/report/assets" in notice and copyright_line in notice


def test_the_same_environment_gives_the_same_document(bom: dict[str, Any]) -> None:
    assert sbom.document(sbom.closure("aer-megatron", ())[0]) == bom


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = sbom.installed()
    monkeypatch.setattr(sbom, "installed", lambda: {name: found for name, found in here.items() if name != "numpy"})
    assert sbom.main([]) == 1
    assert "not installed: numpy" in capsys.readouterr().err


@pytest.mark.processes
def test_diskcache_is_not_needed_by_the_trainer_and_not_imported_by_verifiers(bom: dict[str, Any]) -> None:
    assert not {"diskcache", "outlines"} & {item["name"] for item in bom["components"]}
    program = (
        "import sys; from aer_megatron.rewards.registry import find_verifier;"
        "[find_verifier(name).load(5.0) for name in ('math', 'countdown', 'reasoning_gym:chain_sum')];"
        "print([name for name in ('diskcache', 'outlines') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_servers_are_not_launched_with_what_needs_diskcache() -> None:
    options = ["--model.path=m", "--data.train.task=countdown", "--rollout.engine=sglang", "--sglang.num_servers=1"]
    load_config(None, options)
    with pytest.raises(ValueError, match="grammar_backend='outlines' reads pickles"):
        load_config(None, [*options, "--sglang.launch.grammar_backend=outlines"])


def test_the_licence_is_apache_2_in_full_and_in_the_metadata() -> None:
    text = (ROOT / "LICENSE").read_text()
    for words in ("Apache License", "Version 2.0, January 2004", "9. Accepting Warranty", "END OF TERMS AND"):
        assert words in text
    project = (ROOT / "pyproject.toml").read_text()
    assert 'license = "Apache-2.0"' in project
    assert 'license-files = ["LICENSE", "NOTICE"]' in project


def last_user(stage: list[str]) -> str:
    return next((line.split()[1] for line in reversed(stage) if line.startswith("USER ")), "root")


def test_both_images_run_as_a_user_and_name_their_bases_by_argument() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages: dict[str, list[str]] = {}
    name = ""
    for line in check_image_pins.instructions(text):
        if line.startswith("FROM "):
            name = line.split()[-1]
        stages.setdefault(name, []).append(line)
    assert last_user(stages["cpu"]) == last_user(stages["gpu"]) == "aer"
    assert all(line.rstrip().endswith("aer") or "USER" not in line for line in stages["cpu"])
    bases = [line.split()[1] for line in text.splitlines() if line.startswith("FROM ")]
    outside = [base for base in bases if base not in stages and base != "trainer-apex-${WITH_APEX}"]
    assert outside == ["${PYTHON_311}", "${CUDA}", "${PYTHON_312}"]
    assert set(pin_images.base_images(text)) == {"PYTHON_311", "PYTHON_312", "CUDA"}


def fake_docker(folder: Path, answer: str) -> str:
    program = folder / "docker"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.processes
def test_the_digests_of_the_registry_are_written_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text((ROOT / "Dockerfile").read_text())
    before = file.read_text()
    for letter in "ab":
        answer = f'for last; do :; done; [ "${{last#*@}}" = "$last" ] && echo sha256:{letter * 64}'
        docker = fake_docker(tmp_path, answer)
        common = ["--docker", docker, "--dockerfile", str(file)]
        assert pin_images.main([*common, "--check"]) == 1
        assert pin_images.main(common) == 0
        assert pin_images.main([*common, "--check"]) == 0
        assert file.read_text().count(f"@sha256:{letter * 64}\n") == 3
    assert re.sub("@sha256:b{64}", "", file.read_text()) == before
    assert check_image_pins.pins_of(file.read_text()) == check_image_pins.pins_of(before)
    assert f"python:3.11-slim-bookworm@sha256:{'b' * 64}" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.parametrize("answer", ["exit 1", "echo latest", "echo; exit 0"])
def test_a_registry_without_an_answer_changes_nothing(tmp_path: Path, answer: str) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("ARG CUDA=nvidia/cuda:13\n")
    assert pin_images.main(["--docker", fake_docker(tmp_path, answer), "--dockerfile", str(file)]) == 2
    assert pin_images.main(["--docker", str(tmp_path / "absent"), "--dockerfile", str(file)]) == 2
    assert file.read_text() == "ARG CUDA=nvidia/cuda:13\n"
