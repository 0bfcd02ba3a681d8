"""The figures of a suite: measured from stored task vectors and results, drawn as SVG and PNG."""

from cl_merge.benchmarks.reports.figures.gallery import KINDS, figures_of
from cl_merge.benchmarks.reports.figures.style import Drawing

__all__ = ["KINDS", "Drawing", "figures_of"]
