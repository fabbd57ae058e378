from .amp import Float32OpsHook
from .checkpoint import AdapterCheckpointHook
from .masks import DeviceMasksHook
from .report import ParameterTableHook, ResourceReportHook

__all__ = ['AdapterCheckpointHook', 'DeviceMasksHook', 'Float32OpsHook', 'ParameterTableHook', 'ResourceReportHook']
