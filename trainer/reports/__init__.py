"""HTML pages and charts, and the preview of rows."""
