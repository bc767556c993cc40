"""What a stranger finds at the root: citation, workflow, hooks and templates say what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import aer_megatron

ROOT = Path(__file__).resolve().parents[2]
TARGETS = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_has_the_version_and_the_licence_of_the_package() -> None:
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert str(citation["version"]) == aer_megatron.__version__
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_workflow_reads_only_and_runs_what_there_is() -> None:
    workflow = read(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert not any("permissions" in job for job in jobs.values())
    assert all(job["timeout-minutes"] for job in jobs.values())
    commands = [step["run"] for step in steps if "run" in step]
    assert ".ci/run" in commands
    called = [target for command in commands for target in re.findall(r"\bmake (?:-j\d+ )?([a-z-]+)", command)]
    assert {"test-cpp", "wheel"} <= set(called) <= set(TARGETS)


def test_ci_runs_the_cpp_tests() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    called = [match[1] for line in lines if (match := re.fullmatch(r"(?:exec )?make (?:-j\d+ )?([a-z-]+).*", line))]
    assert "test-cpp" in called
    assert set(called) <= set(TARGETS)


def test_hooks_download_nothing() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["id"] for hook in repository["hooks"]} == {"ruff-check", "ruff-format", "clang-format"}
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem)
def test_issue_forms_have_what_the_hosting_page_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    for field in form["body"]:
        assert field["type"] in {"textarea", "input"}
        assert re.fullmatch(r"[a-z]+", field["id"]) and field["attributes"]["label"]


def test_the_security_policy_points_at_the_place_of_facts() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert "private security advisory" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / link).is_file(), link
