"""docs/surviving_faults.md is where exit statuses are looked up: it has all of them."""

import re

from jaxlm.exit_status import ExitStatus


def test_the_document_has_every_status(repository):
    text = (repository / "docs" / "surviving_faults.md").read_text()
    table = {name: int(status) for status, name in re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", text, re.MULTILINE)}
    assert table == {status.name: status.value for status in ExitStatus}
