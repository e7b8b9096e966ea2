"""A few faults of the soak test; the whole of it: `python tests/faults/soak.py --faults 50`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster


def test_a_run_survives_faults_bit_for_bit(wikipedia):
    if os.geteuid() != 0:
        pytest.skip("its namespaces and file systems need root")
    # This seed draws a killed rank and a full disk.
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--faults=2", "--seed=31"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr
    assert "bit for bit" in result.stdout
