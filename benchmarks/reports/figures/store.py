"""What was measured, kept beside the runs, so that it is measured once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.reports.figures.runs import SuiteRun
from cl_merge.benchmarks.runs.json_files import plain, read_json
from cl_merge.storage.files import atomic_write


class Store:
    """One JSON file for a kind of figure and a seed: the measures of each training.

    A measure is stale once the results of its run, or the options of the kind, have changed.

    Args:
        file: Where it is, or will be.
        options: Of the kind.
    """

    def __init__(self, file: Path, options: Mapping[str, Any] | None = None) -> None:
        self.file = file
        self._options = plain(options or {})
        self._kept = self._read()

    def get(self, run: SuiteRun) -> Any:
        """The measure of a run.

        Args:
            run: The run.

        Returns:
            What was measured; None if nothing was, or it is stale.
        """
        kept = self._kept.get(run.training, {})
        return kept.get("found") if kept.get("results") == run.fingerprint else None

    def get_or_make(self, run: SuiteRun, measure: Callable[[], Any]) -> Any:
        """The measure of a run, taken now if it is missing or stale.

        Args:
            run: The run.
            measure: Takes it; plain values.

        Returns:
            What was measured, as JSON gives it back.
        """
        if self.get(run) is None:
            self._kept[run.training] = {"results": run.fingerprint, "found": plain(measure())}
            content = {"options": self._options, "trainings": self._kept}
            with atomic_write(self.file) as temporary:
                text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
                temporary.write_text(text + "\n", encoding="utf-8")
        return self.get(run)

    def _read(self) -> dict[str, Any]:
        content = read_json(self.file)
        if content is None:
            return {}
        kept: dict[str, Any] = content["trainings"]
        return kept if content["options"] == self._options else {}
