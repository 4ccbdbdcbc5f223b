"""Figures, tables, plots, one HTML page, results with provenance, and the comparison of two runs.

Start with Report.
"""

from dsmini.report.figures import Detail, Figure, Plot, Series, Table, Value, pick, values
from dsmini.report.heat_map import HeatMap
from dsmini.report.report import Report, Section

__all__ = ["Detail", "Figure", "HeatMap", "Plot", "Report", "Section", "Series", "Table", "Value", "pick", "values"]
