"""The OpenAPI document is true: what schemathesis makes of it is answered, or refused as a client's fault."""

import subprocess
import sys

import pytest

from tests.support.server import running

LIMITS = {"steps": 3, "megapixels": 0.01, "side": 64, "images": 1, "regions": 2, "running_seconds": 5.0}


@pytest.mark.slow
def test_no_answer_is_the_servers_fault(tmp_path):
    with running(tmp_path, **LIMITS) as client:
        command = [
            "-m",
            "schemathesis.cli",
            "run",
            f"http://127.0.0.1:{client.port}/openapi.json",
            "--seed",
            "1",
        ]
        true = (
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        )
        checks = ["--checks", true, "--max-examples", "30", "--request-timeout", "20"]
        checks += ["--phases", "coverage,fuzzing", "--max-time", "120"]
        done = subprocess.run(
            [sys.executable, *command, *checks], capture_output=True, text=True, cwd=tmp_path
        )
    assert done.returncode == 0, done.stdout[-4000:]
