"""What is attacked stays on the machine: onnxruntime's telemetry is off in the runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from devices.local import RUNNER


def test_the_runner_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    # Without CI, which would switch telemetry off by itself.
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-E", "-P", str(RUNNER)],
        input=json.dumps({"id": 1, "op": "hello"}) + "\n",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout.splitlines()[0])["ok"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
