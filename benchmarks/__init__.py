"""Side-by-side scripts that print one table each."""
