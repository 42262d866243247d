"""When does adaptive aggregation pay? Worlds, rivals, trainings, one test, and the page of it."""
