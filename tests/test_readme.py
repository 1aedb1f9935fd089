"""What the README shows is what there is: its program runs, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ranks import ranks

from epmoe.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@ranks(1, 2, 4)
def test_the_program_runs_on_any_number_of_ranks(rank):
    program, adapter = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(adapter, "README.md", "exec")  # run by tests/test_generate.py, from examples/
    names: dict[str, object] = {}
    exec(program, names)  # noqa: S102
    assert names["y"].shape == (5, 256)
    assert names["y"].isfinite().all()


@pytest.mark.parametrize(
    "verb", sorted(set(re.findall(r"^epmoe (\w+(?: transport| layer)?)", README, re.M)))
)
def test_every_command_exists_and_has_json(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\]\(([\w./]+)\)|^(launch/\S+)", README, re.M)))
)
def test_every_file_exists(path):
    assert (ROOT / "".join(path)).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make (\w+)", README, re.M))))
def test_every_target_of_make_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
