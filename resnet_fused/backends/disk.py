"""What this package keeps between processes, verdicts and measured choices: small JSON files in the user's cache."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path


def write_json(file: Path, content: dict) -> None:
    """Write atomically: another process finds the old file or the new one. Raises OSError where it cannot."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as written:
            temporary = written.name
            json.dump(content, written, indent=1)
        os.replace(temporary, file)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise
