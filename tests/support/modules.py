"""The modules of the package, and where their files lie in a checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]

FILES = [
    path
    for folder in ("cl_merge", "callbacks", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "cl_merge" else ("cl_merge", *parts)
    return ".".join(parts)
