"""The systemd unit of an edge device: started with the machine, and again when it ends."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from openm6.edge.box import Box


def unit_of(path: Path, host: str, port: int, key_variable: str = "", anyone: bool = False) -> str:
    """The text of /etc/systemd/system/openm6-edge.service. Raises UsageError for a folder that is no edge device."""
    box, place = Box(path), path.resolve()
    words = [sys.executable, str(place / "openm6-edge"), "serve", "--host", host, "--port", str(port)]
    words += ["--key-env", key_variable] * bool(key_variable) + ["--anyone"] * anyone
    variables = [name for name in (box.settings.key, box.settings.encrypt, key_variable) if name]
    secrets = (
        f"# A file that only root reads (chmod 600), with a line NAME=VALUE for {', '.join(variables)}.\n"
        "EnvironmentFile=/etc/openm6-edge.env\n"
    )
    return f"""[Unit]
Description=OpenM6 edge device {_plain(box.settings.name)}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={" ".join(map(_quoted, words)).replace("$", "$$")}
{secrets if variables else ""}User={getpass.getuser()}
UMask=0077
Restart=always
RestartSec=5
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths={_quoted(str(place))}

[Install]
WantedBy=multi-user.target"""


def _quoted(word: str) -> str:
    """A word of a unit: quoted, with the characters doubled that systemd would expand."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("%", "%%")
