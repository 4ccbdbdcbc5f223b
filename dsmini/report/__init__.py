"""Figures, tables, plots, and one HTML page.

Start with Report.
"""

from dsmini.report.figures import Detail, Figure, Plot, Series, Table, Value, pick
from dsmini.report.heat_map import HeatMap
from dsmini.report.report import Report, Section

__all__ = ["Detail", "Figure", "HeatMap", "Plot", "Report", "Section", "Series", "Table", "Value", "pick"]
