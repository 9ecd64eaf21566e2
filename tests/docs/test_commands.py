"""Documented commands run, or at least parse.

Each command of each page goes to one of PROGRAMS; an unknown program fails the test. Quick programs run here, in a workspace that
looks like the checkout, with small pictures, a small model and a finished run in place of DIR, FILE and the like. For slow ones,
and those marked with what they need, the program's own parser reads the arguments, and the config is built and validated.
`pytest tests/docs/test_commands.py -rP` lists what was run and what was parsed.
"""

from pathlib import Path

from tests.helpers.documented import commands, each_page
from tests.helpers.documented_programs import PROGRAMS

# Programs that are not ours, or that change the machine: known, not run.
OTHERS = {
    ".venv/bin/pre-commit",
    "cd",
    "docker",
    "git",
    "lfs",
    "nvidia-smi",
    "pip",
    "source",
    "ss",
    "sysctl",
    "tensorboard",
}


@each_page
def test_commands_work(page, workspace, monkeypatch):
    monkeypatch.chdir(workspace.path)
    faults = []
    for command in commands(page):
        script = command.words[0].startswith(("launch_scripts/", "benchmarks/"))
        name = Path(command.words[0]).name if script else command.words[0]
        try:
            if name in OTHERS:
                done = "another program"
            else:
                assert name in PROGRAMS, "unknown program; a block that holds no commands needs a language"
                done = PROGRAMS[name](command, workspace)
        except (Exception, SystemExit) as error:
            faults.append(f"{command}\n    {type(error).__name__}: {error}")
        else:
            print(f"{done:<16} {command}")
    assert not faults, "\n".join(faults)
