"""One module per revision; a revision's id is the number its file begins with."""
