"""A folder that is sealed by the sha256 of its files, so that damage is seen and a half-written one does not count."""

import hashlib
import json
import os

MANIFEST = "manifest.json"


def seal(folder):
    """Writes the sums of all files below `folder`; from here on it is whole."""
    write_json(folder / MANIFEST, _sums(folder))


def unseal(folder):
    """Takes the seal away, before a deletion that might be cut short."""
    (folder / MANIFEST).unlink(missing_ok=True)


def sealed(folder) -> bool:
    """Whether `folder` was finished; says nothing about later damage."""
    return (folder / MANIFEST).exists()


def damage(folder) -> str | None:
    """The first thing that is wrong with a sealed folder, or None; reads every file."""
    try:
        want, have = json.loads((folder / MANIFEST).read_text()), _sums(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    bad = [name for name in want if have.get(name) != want[name]]
    return f"{bad[0]} is {'changed' if bad[0] in have else 'missing'}" if bad else None


def write_json(path, value):
    """Writes JSON so that the file is either whole or absent, even after a power cut."""
    part = path.with_suffix(".part")
    with open(part, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def _sums(folder):
    """{file name: sha256} of all files below `folder` but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): _sum(path) for path in files}


def _sum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
