"""Values of commit c2cfd24 that no change of layout may move, and the code that computes them."""
