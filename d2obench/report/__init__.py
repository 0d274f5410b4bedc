"""Views of a run: read the records, compute once, render many times. Imports no torch.

``build`` makes a :class:`~d2obench.report.view.Report`, ``write_views`` its files, ``print_tables`` its headline on a
terminal. The live display is ``d2obench.report.display``.
"""

from d2obench.report.build import build
from d2obench.report.render import FORMATS
from d2obench.report.write import check, print_tables, write_report, write_views

__all__ = ["FORMATS", "build", "check", "print_tables", "write_report", "write_views"]
