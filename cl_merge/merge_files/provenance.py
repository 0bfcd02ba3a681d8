"""What a merged file says of how it was made; the same inputs give the same words."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cl_merge import __version__
from cl_merge.merge_files.plan import Plan
from cl_merge.mergers import Merger
from cl_merge.task_vectors.scales import Scales
from cl_merge.task_vectors.selection import Selection

_NO_HASH = "0" * 32


def describe_merge(
    plan: Plan, merger: Merger, method: str | Merger, scales: Scales, selection: Selection
) -> dict[str, str]:
    """Describe a merge in the metadata of its output.

    Args:
        plan: What is merged.
        merger: What merges.
        method: The name that was asked for; aliases of a merger are kept.
        scales: Factors of the merged task vector.
        selection: Which parameters are merged.

    Returns:
        Words under keys that begin with ``cl_merge.``; hashes are still zeros.
    """
    inputs = [
        # Of "." and "..", too, the name is that of the folder.
        {
            "file": Path(os.path.abspath(weights.path)).name,
            "kind": weights.kind,
            "role": role,
            "xxh3_128": _NO_HASH,
        }
        for role, group in (
            ("base", [plan.base]),
            ("task", plan.tasks),
            ("importance", plan.importances),
        )
        for weights in group
    ]
    return {
        "format": "pt",  # which transformers insists on
        "cl_merge.version": __version__,
        "cl_merge.method": method if isinstance(method, str) else merger.name,
        "cl_merge.options": json.dumps(merger.options),
        "cl_merge.scale": json.dumps(scales.plain()),
        "cl_merge.include": json.dumps(list(selection.include)),
        "cl_merge.exclude": json.dumps(list(selection.exclude)),
        "cl_merge.inputs": json.dumps(inputs),
    }
