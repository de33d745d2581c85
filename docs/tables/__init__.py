"""The tables of the pages that are made from the records in ``docs/logs``."""
