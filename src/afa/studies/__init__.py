"""Programs that use all other packages: the demo, the zoo build, the study of the results page."""
