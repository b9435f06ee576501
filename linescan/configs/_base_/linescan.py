# Registers linescan's types, and before the bases that follow are looked up: so "mmseg::" is found in the maintained
# fork of mmsegmentation as well, whichever program reads the config.
__import__('linescan.openmmlab')
custom_imports = dict(imports=['linescan.openmmlab'])
