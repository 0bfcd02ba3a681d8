"""Task streams: a data set, the ways to split it into tasks, and the order of its images."""
