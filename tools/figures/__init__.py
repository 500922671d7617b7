"""Parts of ``tools/draw_figures.py``."""
