"""Networks assembled from resolved configs, and what one asks of them."""
