"""The help of `starling`: what a newcomer sees first."""

from __future__ import annotations

import pytest

from starling.engine_ext.serving.cli import main as cli


def test_the_help_speaks_of_documents_and_begins_with_what_a_server_needs(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert "documents in any order" in said
    first, others = said.split("\nto measure, train and fill:\n")
    names = [line.split()[0] for line in first.split("\ncommands:\n")[1].splitlines() if line]
    assert names == ["serve", "doctor", "advise", "setup-cpu"]
    assert {line.split()[0] for line in others.splitlines() if line.startswith("  ")} == cli.OTHERS.keys()
    assert len(cli.COMMANDS) == len(cli.FIRST) + len(cli.OTHERS)
