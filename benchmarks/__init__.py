"""What is run to know: accuracy grids, costs, their results, and the report made of them (README.md)."""
