"""docs/surviving_faults.md is where exit statuses are looked up: it has all of them."""

import re

from jaxlm.exit_status import AGAIN, ExitStatus, ended


def test_the_document_has_every_status(repository):
    text = (repository / "docs" / "surviving_faults.md").read_text()
    table = {name: int(status) for status, name in re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", text, re.MULTILINE)}
    assert table == {status.name: status.value for status in ExitStatus}


def test_what_is_to_be_started_again_is_noted(tmp_path, monkeypatch):
    monkeypatch.setenv(AGAIN, str(tmp_path / "again"))
    for status in ExitStatus:
        assert ended(status) is status
        assert (tmp_path / "again").exists() == (status in (ExitStatus.PREEMPTED, ExitStatus.HUNG))
        (tmp_path / "again").unlink(missing_ok=True)
    monkeypatch.setenv(AGAIN, str(tmp_path / "missing" / "again"))
    assert ended(ExitStatus.HUNG) is ExitStatus.HUNG
