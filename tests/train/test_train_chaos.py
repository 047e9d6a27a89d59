"""Twenty kills at random moments, on changing numbers of ranks; see chaos.py for what is compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_survives_kills_at_random_moments():
    script = Path(__file__).with_name("chaos.py")
    result = subprocess.run([sys.executable, str(script), "--cases=20"], capture_output=True, text=True, timeout=850)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every run ended as the undisturbed one" in result.stdout
