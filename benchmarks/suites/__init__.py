"""Suites: tables of data sets, numbers of tasks, methods and seeds."""
