"""The report of a suite or of a single run: one HTML file that needs no network."""

from cl_merge.benchmarks.reports.html.page import write_report

__all__ = ["write_report"]
