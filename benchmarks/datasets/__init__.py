"""One YAML file per data set."""
