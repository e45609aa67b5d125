"""The alerts: promtool's own tests of the rules, and that what they ask for exists."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import yaml

from tests.conftest import ROOT
from tests.deploy.conftest import alerts_file, needs


@needs("promtool")
def test_each_alert_fires_when_it_should(tmp_path: Path) -> None:
    shutil.copy(alerts_file(), tmp_path)
    tests = shutil.copy(ROOT / "tests/deploy/alerts.test.yaml", tmp_path)
    ended = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_each_alert_has_a_test_and_says_what_to_do() -> None:
    tested = {
        case["alertname"]
        for group in yaml.safe_load((ROOT / "tests/deploy/alerts.test.yaml").read_text())["tests"]
        for case in group["alert_rule_test"]
    }
    rules = yaml.safe_load(alerts_file().read_text())["groups"][0]["rules"]
    assert tested == {rule["alert"] for rule in rules}
    assert all({"summary", "action"} == rule["annotations"].keys() for rule in rules)
