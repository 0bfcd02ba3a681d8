"""The report of a suite or of a single run: one HTML file that needs no network."""

from cl_merge.benchmarks.reports.html.pictures import pictures_of_run
from cl_merge.benchmarks.reports.html.report import write_report
from cl_merge.benchmarks.reports.html.single import summary_of_run

__all__ = ["pictures_of_run", "summary_of_run", "write_report"]
