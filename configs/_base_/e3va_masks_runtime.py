# For heads that crop ground-truth masks: these go to the device once a step.
_base_ = './e3va_runtime.py'
custom_hooks = _base_.custom_hooks + [dict(type='DeviceMasksHook')]
