"""A trained model in the formats of other programs, with its model card."""

from minigpt.exporting.config import ExportConfig
from minigpt.exporting.exporter import export

__all__ = ["ExportConfig", "export"]
