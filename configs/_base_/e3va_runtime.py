# What every config of this project adds to a stock one: the package, and the reports of what a run costs.
custom_imports = dict(imports=['e3va_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='ParameterTableHook'), dict(type='ResourceReportHook')]
