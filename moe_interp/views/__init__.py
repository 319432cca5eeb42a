"""LOOK: figures and the report. The only part that imports plotly, and only when it is used."""
