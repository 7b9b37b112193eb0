"""One file for each library that compiles graphs, and the table of them."""
