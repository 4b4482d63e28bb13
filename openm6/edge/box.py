"""The folder of an edge device.

box.toml                settings (settings.py), written once, to be edited (live.py)
versions/0001/package   the ONNX bundle that answers (package.py), and sureness-TASK.npz of each calibrated task
versions/0001/model     the model it was exported from, to learn on; not needed by a device that only answers
current                 the number of the version that answers; replaced atomically
eyes/                   the image encoder of the cloud's model, to send features in place of pictures
kept.sqlite             the answer store (kept.py)
serving.json, box.log   the state of the serving process (status.py), and its log
openm6-edge             the program: `python openm6-edge serve`
"""

from __future__ import annotations

from pathlib import Path

from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.files import write_text
from openm6.edge.settings import Settings, settings_in, values_in

FILE, CURRENT, VERSIONS, EYES = "box.toml", "current", "versions", "eyes"


class Box:
    """An edge device's folder."""

    def __init__(self, path: str | Path):
        """Raises UsageError for another folder, or an invalid box.toml."""
        self.path = Path(path)
        self.content = read_content(self.path)
        self.settings = settings_in(self.path / FILE, values_in(self.path / FILE, self.content))

    @classmethod
    def with_settings(cls, path: Path, settings: Settings) -> Box:
        """An edge device with these settings in place of its box.toml."""
        made = cls.__new__(cls)
        made.path, made.content, made.settings = path, b"", settings
        return made

    @property
    def version(self) -> str:
        try:
            number = (self.path / CURRENT).read_text("utf-8").strip()
        except OSError:
            raise OpenM6Error(f"{self.path} is damaged: {CURRENT} cannot be read.") from None
        if not (self.path / VERSIONS / number / "package").is_dir() or not number.isdigit():
            raise OpenM6Error(f"{self.path} is damaged: it has no version {number[:20]!r}.")
        return number

    @property
    def versions(self) -> list[str]:
        """Numbers of all versions, the oldest first."""
        return sorted(p.name for p in (self.path / VERSIONS).glob("[0-9]*") if (p / "package").is_dir())

    def folder(self, version: str | None = None) -> Path:
        return self.path / VERSIONS / (version or self.version)

    def next_version(self) -> str:
        return f"{int(max(self.versions, default='0')) + 1:04}"

    def use(self, version: str) -> None:
        """Let a version answer from now on. Raises UsageError for an unknown one."""
        if version not in self.versions:
            raise UsageError(f"{self.path} has no version {version}. It has: {', '.join(self.versions)}.")
        write_text(self.path / CURRENT, version + "\n")


def read_content(path: Path) -> bytes:
    """The bytes of box.toml. Raises UsageError where they cannot be read."""
    try:
        return (path / FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is not an edge device: it has no {FILE}. `openm6 cascade init` makes one.") from None
    except OSError as error:
        raise UsageError(f"{path / FILE} cannot be read ({error.strerror}).") from None
