"""Renderers: a :class:`d2obench.report.view.Report` in one format each; they format and escape, and compute nothing."""
