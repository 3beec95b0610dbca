"""Reports: pages and pictures of what was measured, from data alone."""
