"""Pages, each one HTML file that needs no network: of a suite or a run, and a leaderboard."""

from cl_merge.benchmarks.reports.html.leaderboard import write_leaderboard
from cl_merge.benchmarks.reports.html.page import write_report

__all__ = ["write_leaderboard", "write_report"]
