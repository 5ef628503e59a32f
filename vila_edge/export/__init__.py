"""How a checkpoint becomes a bundle, on a workstation. (The scripts of single steps are in `export/`.)"""
