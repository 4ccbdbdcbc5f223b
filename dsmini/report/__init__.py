"""Figures, tables, plots, and one HTML page.

Start with Report.
"""

from dsmini.report.figures import Detail, Figure, Plot, Series, Table, Toned, Value, pick
from dsmini.report.report import Report, Section

__all__ = ["Detail", "Figure", "Plot", "Report", "Section", "Series", "Table", "Toned", "Value", "pick"]
