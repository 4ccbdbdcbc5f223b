"""Figures, tables, plots, one HTML page, results with provenance, and the comparison of two runs.

Start with Report.
"""

from dsmini.report.figures import Figure, Plot, Series, Table, Value, pick, values
from dsmini.report.report import Report, Section

__all__ = ["Figure", "Plot", "Report", "Section", "Series", "Table", "Value", "pick", "values"]
