"Widgets for JupyterLab: runs, sweeps and models to look at, forms to run them again"
