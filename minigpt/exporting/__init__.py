"""A trained model in the formats of other programs, with its model card."""

from minigpt.exporting.exporter import ExportConfig, export

__all__ = ["ExportConfig", "export"]
