"""One model as one file: a pipeline folder as a single file in the layout of the original code."""

from afa.exporting.plan import ExportPlan, plan_export
from afa.exporting.run import ExportProgress, export_checkpoint, run_export

__all__ = ["ExportPlan", "ExportProgress", "export_checkpoint", "plan_export", "run_export"]
