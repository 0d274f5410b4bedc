"""Views of a run: its records are read and every figure is computed once, then rendered in any format.

:func:`build` makes a :class:`~d2obench.report.view.Report` of run folders, and :func:`write_report` writes it in the
formats asked for. Nothing here imports torch.
"""

from d2obench.report.build import build
from d2obench.report.render import FORMATS, check, write_report

__all__ = ["FORMATS", "build", "check", "write_report"]
