"""The figures of the pages, drawn from records."""
