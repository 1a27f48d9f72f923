"""Who may import whom is a contract, not a habit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_import_contracts_of_setup_cfg_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


def test_every_init_file_is_empty() -> None:
    packages = ("conf", "datamodules", "experiments", "lightning_modules", "moevlm", "tests")
    full = [path for name in packages for path in (ROOT / name).rglob("__init__.py") if path.read_text().strip()]
    assert full == []
