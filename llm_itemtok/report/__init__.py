"""The report of a run as one HTML page, and the pictures of it that others draw, too."""
