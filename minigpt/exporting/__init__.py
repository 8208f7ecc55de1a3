"""Export of trained models to the formats of other programs, with a model card."""

from minigpt.exporting.config import ExportConfig
from minigpt.exporting.exporter import export

__all__ = ["ExportConfig", "export"]
