"""The figures of a suite: measured from stored task vectors and results, drawn as SVG and PNG."""

from cl_merge.benchmarks.reports.figures.figure import Drawing
from cl_merge.benchmarks.reports.figures.gallery import KINDS, figures_of

__all__ = ["KINDS", "Drawing", "figures_of"]
