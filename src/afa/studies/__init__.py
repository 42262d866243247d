"""What is run with all of the other packages: the demo, the zoo, the comparison of the pages."""
