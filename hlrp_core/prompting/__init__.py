"""Prompts: settings (`prompt.py`), the strategies, and their names (`catalogue.py`)."""
