"""A page that shows samples and rows as the model sees them (``tools/view_data.py``)."""
