from .amp import Float32OpsHook
from .checkpoint import AdapterCheckpointHook
from .report import ParameterTableHook, ResourceReportHook

__all__ = ['AdapterCheckpointHook', 'Float32OpsHook', 'ParameterTableHook', 'ResourceReportHook']
