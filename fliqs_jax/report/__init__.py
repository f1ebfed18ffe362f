"""Report of a finished run: tables, figures, one HTML page."""
