"""Export of trained models, with a model card, to formats that other programs read."""

from minigpt.exporting.config import ExportConfig
from minigpt.exporting.exporter import export

__all__ = ["ExportConfig", "export"]
