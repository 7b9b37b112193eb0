"""The server's log: lines of JSON."""

from __future__ import annotations

import json
import logging
import sys


class Lines(logging.Formatter):
    """Every record as a line of JSON; the requests' are such already."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "runtime.serve.requests":
            return record.getMessage()
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_lines() -> None:
    """Have this process's log be lines of JSON on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    logging.getLogger("python_multipart").setLevel(
        logging.CRITICAL
    )  # what is wrong with a form, the client is told
