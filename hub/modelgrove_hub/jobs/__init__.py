"""Jobs: rows that say what is to be done, and the code that does one of them."""
