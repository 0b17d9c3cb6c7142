"""Charts from result records, and the page that shows them."""
