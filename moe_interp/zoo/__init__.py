"""The bundled reference model and the code that trained it. Importing this package loads nothing heavy."""
