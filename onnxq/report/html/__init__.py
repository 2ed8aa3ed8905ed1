"""Reports as single HTML files: no network, no framework, readable without JavaScript."""

from onnxq.report.html.compare import html_compare
from onnxq.report.html.run import html_report

__all__ = ["html_compare", "html_report"]
